"""Lion on an 8-bit moment: against the formula with the public quantiser, at every shape, dtype and portion. (Law 1.)"""

from itertools import pairwise

import pytest
import torch
from test_kernels_adamw8bit import SHAPES, WORK, assert_same, operands
from test_kernels_rounding import round_bf16

from interpreter import interpreted
from rowwise.kernels.blockwise import dequantise, quantise
from rowwise.kernels.lion8bit import lion8bit_, lion8bit_reference_

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}


def textbook(p, g, exp_avg, lr, beta1, beta2, weight_decay):
    """One step of one tensor: the new parameter and the new moment, before anything is rounded."""
    dtype = WORK[p.dtype]
    x, g, m = p.to(dtype), g.to(dtype), dequantise(*exp_avg, True, dtype)
    x = x - lr * ((beta1 * m + (1 - beta1) * g).sign() + weight_decay * x)
    return x, beta2 * m + (1 - beta2) * g


def assert_step(shapes, dtype, grad_dtype=None):
    params, grads, exp_avgs, _ = operands(shapes, dtype, grad_dtype)
    expected = [textbook(*each, **HYPER) for each in zip(params, grads, exp_avgs, strict=True)]
    rounding = [(i, 5 * i) for i in range(len(shapes))] if dtype == torch.bfloat16 else None
    lion8bit_(params, grads, exp_avgs, **HYPER, rounding=rounding)
    for i, (x, m) in enumerate(expected):
        if rounding:
            x = round_bf16(x, *rounding[i])
            assert (params[i] != x).sum() <= 1 + 1e-3 * x.numel()
            torch.testing.assert_close(params[i], x, rtol=2**-7, atol=1e-6)
        else:
            torch.testing.assert_close(params[i], x, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-7)
        assert_same(exp_avgs[i], quantise(m, True), exact=dtype == torch.float64)


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
def test_portions_change_nothing(elements, monkeypatch):
    monkeypatch.setattr("rowwise.kernels.portions.ELEMENTS", elements)
    for dtype in WORK:
        assert_step([(3, 300), (1, 300), (40, 300), (2, 512), (7, 256), (1, 300), (0, 300), (30, 768)], dtype)


def test_the_iterates_enter_the_box_of_the_weight_decay_and_stay():
    """*Lion Secretly Solves Constrained Optimization*: what sticks out of |x|_inf <= 1 / wd shrinks by 1 - lr wd a step."""
    torch.manual_seed(0)
    x, m = torch.randn(4, 300) * 5, quantise(torch.zeros(4, 300), True)
    outside = [(x.abs().max() - 1).item()]
    for _ in range(200):
        lion8bit_([x], [torch.randn(4, 300) - 0.5], [m], lr=0.05, beta1=0.9, beta2=0.99, weight_decay=1.0)
        outside.append((x.abs().max() - 1).item())
    assert outside[0] > 5 and outside[-1] < 1e-3
    assert all(after <= max(0.0, 0.95 * before) + 1e-6 for before, after in pairwise(outside))


def agree():
    from rowwise.kernels.lion8bit_triton import lion8bit_triton_

    every = [torch.float32, torch.bfloat16]
    for i, shape in enumerate([*SHAPES[:5], (3, 768), (1, 704), (1, 1000)]):
        for dtype, grad_dtype in [(torch.float32, torch.float32), (torch.bfloat16, every[i % 2])]:
            ours, reference = (operands([shape], dtype, grad_dtype)[:3] for _ in range(2))
            rounding = [(2**63 + 7, 8 + i)] if dtype == torch.bfloat16 else None
            lion8bit_triton_(*ours, *HYPER.values(), rounding)
            lion8bit_reference_(*reference, *HYPER.values(), rounding)
            torch.testing.assert_close(ours[0][0], reference[0][0], rtol=1e-6, atol=1e-7)
            assert_same(ours[2][0], reference[2][0])


def test_triton_agrees_with_torch():
    interpreted("test_kernels_lion8bit", "agree")
