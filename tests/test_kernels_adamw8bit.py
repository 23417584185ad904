"""AdamW on 8-bit moments: against the formula with the public rounding, at every shape, dtype and portion. (Law 1.)"""

import pytest
import torch
from test_kernels_moment_pair import rounded
from test_kernels_rounding import round_bf16

from interpreter import interpreted
from rowwise.kernels.adamw8bit import adamw8bit_, adamw8bit_reference_
from rowwise.kernels.blockwise import quantise
from rowwise.kernels.moment_pair import dequantise_pair

SHAPES = [(0, 512), (1, 1), (3, 255), (2, 256), (5, 257), (70, 768), (2, 704), (3, 1000), (1, 2048)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
WORK = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}


def operands(shapes, dtype, grad_dtype=None):
    """Parameters, gradients, and moments as they are after some steps."""
    draw = torch.Generator().manual_seed(len(shapes))
    normal = [torch.randn(4, *shape, generator=draw, dtype=torch.float64) for shape in shapes]
    params, grads = [t[0].to(dtype) for t in normal], [(t[1] * 0.1).to(grad_dtype or dtype) for t in normal]
    exp_avgs = [quantise(t[2] * 0.03, True) for t in normal]
    exp_avg_sqs = [quantise(t[3].square() * 0.01, False) for t in normal]
    return params, grads, exp_avgs, exp_avg_sqs


def textbook(p, g, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    """One step of one tensor: the new parameter and the new moments, before anything is rounded."""
    dtype = WORK[p.dtype]
    x, g = p.to(dtype), g.to(dtype)
    m, v = dequantise_pair(exp_avg, exp_avg_sq, dtype)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    x = x - lr * weight_decay * x - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return x, m, v


def assert_same(ours, expected, exact=False):
    """Two moments: the same maxima, and codes at most one apart, where arithmetic in another order crossed a midpoint."""
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-6, atol=0)
    apart = (ours[0].int() - expected[0].int()).abs()
    assert (apart <= 1).all() and apart.sum() <= (0 if exact else 1 + 1e-4 * apart.numel())


def assert_step(shapes, dtype, grad_dtype=None, step=7):
    params, grads, exp_avgs, exp_avg_sqs = operands(shapes, dtype, grad_dtype)
    expected = [textbook(*each, step, **HYPER) for each in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)]
    rounding = [(i, 5 * i) for i in range(len(shapes))] if dtype == torch.bfloat16 else None
    adamw8bit_(params, grads, exp_avgs, exp_avg_sqs, step, **HYPER, rounding=rounding)
    for i, (x, m, v) in enumerate(expected):
        if rounding:
            x = round_bf16(x, *rounding[i])
            assert (params[i] != x).sum() <= 1 + 1e-3 * x.numel()  # the last bit of x, over a random threshold
            torch.testing.assert_close(params[i], x, rtol=2**-7, atol=1e-6)
        else:
            close = {"rtol": 1e-12, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
            torch.testing.assert_close(params[i], x, **close)
        for ours, rounding_alone in zip((exp_avgs[i], exp_avg_sqs[i]), rounded(m, v), strict=True):
            assert_same(ours, rounding_alone, exact=dtype == torch.float64)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float64, None),
        (torch.float64, torch.float32),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_formula_at_every_shape(dtype, grad_dtype):
    for shape in SHAPES:
        assert_step([shape], dtype, grad_dtype)
    assert_step(SHAPES, dtype, grad_dtype)
    assert_step([], dtype)


@pytest.mark.parametrize("elements", [300, 2000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_portions_change_nothing(dtype, elements, monkeypatch):
    """Tensors that share a portion, and tensors cut into several, take the step they take alone."""
    monkeypatch.setattr("rowwise.kernels.portions.ELEMENTS", elements)
    assert_step([(3, 300), (1, 300), (40, 300), (2, 512), (7, 256), (1, 300), (0, 300), (30, 768)], dtype)


def test_rows_do_not_know_of_one_another():
    whole, parts = operands([(9, 700)], torch.bfloat16), operands([(9, 700)], torch.bfloat16)
    adamw8bit_(*whole, 3, **HYPER, rounding=[(8, 0)])
    for rows in (slice(0, 4), slice(4, 4), slice(4, 9)):
        p, g, m, v = ([t[rows] if torch.is_tensor(t) else tuple(s[rows] for s in t) for t in each] for each in parts)
        adamw8bit_(p, g, m, v, 3, **HYPER, rounding=[(8, rows.start * 700)])
    for one, other in zip(whole, parts, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else all(map(torch.equal, a, b))


def test_steps_from_zero_follow_adamw():
    """The claim of the paper on a small scale: 60 steps with 8-bit moments end where 32-bit ones do."""
    torch.manual_seed(0)
    target, start = torch.randn(16, 512), torch.randn(16, 512)
    ours, plain = start.clone(), start.clone().requires_grad_()
    peer = torch.optim.AdamW([plain], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    state = [quantise(torch.zeros(16, 512), True)], [quantise(torch.zeros(16, 512), False)]
    for step in range(1, 61):
        adamw8bit_([ours], [ours - target], *state, step, 0.05, 0.9, 0.95, 1e-8, 0.0)
        plain.grad = plain.detach() - target
        peer.step()
    losses = [(x.detach() - target).square().mean().item() for x in (start, plain, ours)]
    assert losses[1] < 0.1 * losses[0] and abs(losses[2] - losses[1]) < 0.02 * losses[0]


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    p, g, m, v = operands([(2, 600)], torch.float32)
    g[0][0, 300] = torch.nan
    adamw8bit_(p, g, m, v, 1, **HYPER)
    assert p[0].isnan().sum() == 1 and m[0][1].isnan().sum() == v[0][1].isnan().sum() == 1
    p, g, m, v = operands([(2, 600)], torch.float32)
    g[0][0, 300] = 1e30  # whose square float32 does not hold
    adamw8bit_(p, g, m, v, 1, **HYPER)
    assert p[0].isfinite().all() and v[0][1].isinf().sum() == 1
    zeros = [quantise(torch.zeros(2, 600), signed) for signed in (True, False)]
    before = [moment[0].clone() for moment in zeros]
    x = [torch.randn(2, 600)]
    kept = x[0] * (1 - HYPER["lr"] * HYPER["weight_decay"])
    adamw8bit_(x, [torch.zeros(2, 600)], [zeros[0]], [zeros[1]], 1, **HYPER)
    torch.testing.assert_close(x[0], kept)
    assert all(
        torch.equal(moment[0], codes) and (moment[1] == 0).all() for moment, codes in zip(zeros, before, strict=True)
    )


def agree():
    from rowwise.kernels.adamw8bit_triton import adamw8bit_triton_

    every = [torch.float32, torch.bfloat16]
    for i, shape in enumerate([*SHAPES[:5], (3, 768), (1, 704), (1, 1000)]):
        for dtype, grad_dtype in [(torch.float32, torch.float32), (torch.bfloat16, every[i % 2])]:
            ours, reference = (operands([shape], dtype, grad_dtype) for _ in range(2))
            rounding = [(2**63 + 7, 8 + i)] if dtype == torch.bfloat16 else None
            adamw8bit_triton_(*ours, 5, *HYPER.values(), rounding)
            adamw8bit_reference_(*reference, 5, *HYPER.values(), rounding)
            if dtype == torch.bfloat16:
                assert (ours[0][0] != reference[0][0]).sum() <= 1
                torch.testing.assert_close(ours[0][0], reference[0][0], rtol=2**-7, atol=1e-6)
            else:
                torch.testing.assert_close(ours[0][0], reference[0][0], rtol=1e-5, atol=1e-7)
            assert_same(ours[2][0], reference[2][0])
            assert_same(ours[3][0], reference[3][0])


def test_triton_agrees_with_torch():
    interpreted("test_kernels_adamw8bit", "agree")
