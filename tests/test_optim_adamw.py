"""AdamW against its formula, in float64, and its state under sharding."""

import torch
from bare import bare

from rowwise.kernels.adamw import adamw_
from rowwise.optim.adamw import AdamWConfig
from rowwise.optim.build import build_optimizer, named_state, set_step


def by_the_formula(x, g, m, v, t, lr, b1, b2, eps, wd):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    x = x - lr * wd * x - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return x, m, v


def test_five_steps_are_those_of_the_formula():
    torch.manual_seed(0)
    shapes = [(7, 5), (3,), (1, 1), (0, 4), (257, 33)]
    params = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    expected = [(p.clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for t in range(1, 6):
        grads = [torch.randn_like(p) for p in params]
        hyper = (0.01 * t, 0.9, 0.95, 1e-8, 0.1)
        expected = [
            by_the_formula(*state[:1], g, *state[1:], t, *hyper) for state, g in zip(expected, grads, strict=True)
        ]
        adamw_(params, grads, m, v, t, *hyper)
        for ours, theirs in zip(zip(params, m, v, strict=True), expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_matrices_decay_and_norms_do_not():
    model = bare(torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.RMSNorm(4)))
    optimizer = build_optimizer(model, AdamWConfig(lr=0.5, weight_decay=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    matrix, vector = model.parameters()
    torch.testing.assert_close(matrix.detach(), before[0] * (1 - 0.5 * 0.1))
    torch.testing.assert_close(vector.detach(), before[1])


def test_state_is_tensors_by_name_and_the_count_is_restored():
    model = bare(torch.nn.Linear(3, 4))
    optimizer = build_optimizer(model, AdamWConfig())
    assert {name: set(state) for name, state in named_state(model, optimizer).items()} == {
        "weight": {"exp_avg", "exp_avg_sq"},
        "bias": {"exp_avg", "exp_avg_sq"},
    }
    set_step(optimizer, 41)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert {group["step"] for group in optimizer.param_groups} == {42}
