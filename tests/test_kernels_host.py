"""Kernels that numba compiles for the host: the numbers of plain torch to the last bit, from any thread and in any fork. (Law 1.)

torch computes what its vector loops leave over of a list, the last of fewer than 16 numbers, in another order; there, and on
processors for which torch itself is compiled otherwise, the forms may differ as Triton's do."""

import math
import os
import sys
import threading

import pytest
import torch
from test_kernels_adamw8bit import HYPER, SHAPES, assert_same, operands
from test_kernels_rounding import KEY, bits_of

from rowwise.kernels import dispatch
from rowwise.kernels.adamw import adamw_
from rowwise.kernels.adamw8bit import adamw8bit_, adamw8bit_reference_
from rowwise.kernels.adamw8bit_numba import adamw8bit_kernel, adamw8bit_numba_
from rowwise.kernels.host_numba import kernel
from rowwise.kernels.lion8bit import lion8bit_, lion8bit_reference_
from rowwise.kernels.lion8bit_numba import lion8bit_numba_
from rowwise.kernels.rounding import LARGEST, round_bf16_, round_reference_
from rowwise.kernels.rounding_numba import round_numba_
from rowwise.optim.adamw import AdamW
from rowwise.optim.lion import Lion
from rowwise.optim.optimizer import Optimizer

LION = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
CALLS = {
    "adamw8bit": (adamw8bit_numba_, adamw8bit_reference_, 4, (7, *HYPER.values())),
    "lion8bit": (lion8bit_numba_, lion8bit_reference_, 3, tuple(LION.values())),
}


def stepped(rule, given, rounding):
    """The operands after a step of each form: parameter, then codes and absmax of each moment."""
    ours, reference, count, rates = CALLS[rule]
    for form, (params, grads, *moments) in zip((ours, reference), given, strict=True):
        form(params, grads, *moments[: count - 2], *rates, rounding)
    return [(params, *moments[: count - 2]) for params, _, *moments in given]


def flat(moments):
    """Codes and absmax of all moments, each a list of pairs."""
    return [t for moment in moments for pair in moment for t in pair]


def of_16(shape):
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and math.prod(shape) % 16 == 0


@pytest.mark.parametrize("rule", CALLS)
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
def test_the_numbers_of_plain_torch(rule, dtype, grad_dtype):
    for i, shape in enumerate([*SHAPES, (40, 1024), (16, 100), (16, 301)]):
        given = [operands([shape], dtype, grad_dtype) for _ in range(2)]
        rounding = [(2**63 + 7, 8 + i)] if dtype == torch.bfloat16 else None
        (params, *moments), (expected, *expected_moments) = stepped(rule, given, rounding)
        if of_16(shape):
            assert torch.equal(params[0], expected[0])
            assert all(map(torch.equal, flat(moments), flat(expected_moments)))
            continue
        assert (params[0] != expected[0]).sum() <= 16
        torch.testing.assert_close(params[0], expected[0], rtol=2**-7 if rounding else 2**-22, atol=0)
        for mine, theirs in zip(moments, expected_moments, strict=True):
            assert_same(mine[0], theirs[0])


@pytest.mark.parametrize("rates", [{"beta1": 0.0}, {"beta1": 0.5}, {"beta1": 0.3, "beta2": 0.4}, {"weight_decay": 0.0}])
def test_the_numbers_of_plain_torch_at_other_rates(rates):
    for rule, usual in (("adamw8bit", {"step": 3, **HYPER}), ("lion8bit", LION)):
        ours, reference, count, _ = CALLS[rule]
        one, other = (operands([(32, 512)], torch.float32)[:count] for _ in range(2))
        ours(*one, **usual | rates)
        reference(*other, **usual | rates)
        assert torch.equal(one[0][0], other[0][0]) or not of_16((32, 512))
        torch.testing.assert_close(one[0][0], other[0][0], rtol=1e-6, atol=1e-7)
        for mine, theirs in zip(one[2:], other[2:], strict=True):
            assert_same(mine[0], theirs[0])


@pytest.mark.parametrize("rule", CALLS)
def test_what_is_not_finite_is_where_plain_torch_has_it(rule):
    given = [operands([(6, 512)], torch.float32) for _ in range(2)]
    for _, grads, *_ in given:
        grads[0][0, 3], grads[0][1, 300], grads[0][2, 5], grads[0][3, 6] = torch.nan, torch.inf, -torch.inf, 1e30
    (x, *moments), (expected, *expected_moments) = stepped(rule, given, None)
    torch.testing.assert_close(x[0], expected[0], rtol=0, atol=0, equal_nan=True)
    for ((codes, absmax),), ((other, theirs),) in zip(moments, expected_moments, strict=True):
        torch.testing.assert_close(absmax, theirs, rtol=0, atol=0, equal_nan=True)
        finite = theirs.isfinite().repeat_interleave(256, dim=1)
        assert not finite.all() and torch.equal(codes[finite], other[finite])


def test_16_bit_numbers_are_rounded_to_the_same_bits():
    ends = torch.tensor([LARGEST, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, 1e-42])
    keys = (0, 1, KEY, 2**64 - 5)
    for i, count in enumerate((0, 1, 255, 256, 257, 704, 1000, 2500)):
        for start in (0, 4, 5, 2**34 + 3):
            x = torch.cat([ends, torch.randn(count)])
            ours, reference = torch.empty(len(x)).bfloat16(), torch.empty(len(x)).bfloat16()
            round_numba_(x, ours, keys[i % 4], start)
            round_reference_(x, reference, keys[i % 4], start)
            assert torch.equal(ours.isnan(), reference.isnan())
            assert torch.equal(bits_of(ours)[~x.isnan()], bits_of(reference)[~x.isnan()])
    round_numba_(torch.empty(0, 3), torch.empty(0, 3).bfloat16(), KEY, 0)


RULES = {"adamw": lambda: AdamW([0.9, 0.95], 1e-8), "lion": lambda: Lion([0.9, 0.99])}
MIXED = [(33, 512), (16,), (2, 3, 48)]


def after_three_steps(rule, dtype, grad_dtype):
    """Parameters and states after three steps of the optimizer."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in MIXED]
    group = {"params": params, "names": list("abc"), "rule": RULES[rule](), "weight_decay": 0.1, "batched": False}
    optimizer = Optimizer([group | {"view": "dense"}], 1e-2, seed=3)
    for _ in range(3):
        for p in params:
            gradient = torch.randn(p.shape[::-1], generator=draw).to(grad_dtype).permute(*range(p.dim())[::-1])
            p.grad_dtype, p.grad = grad_dtype, gradient
        optimizer.step()
    return [*params, *(state for p in params for state in optimizer.state[p].values())]


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_32_bit_states_step_as_in_plain_torch(rule, dtype, grad_dtype, monkeypatch):
    expected = after_three_steps(rule, dtype, grad_dtype)
    if dtype == torch.bfloat16:  # which then is copied nowhere
        monkeypatch.setattr("rowwise.optim.optimizer.round_bf16_", None)
    monkeypatch.setattr(dispatch, "WORTH_NUMBA", 0)
    for ours, theirs in zip(after_three_steps(rule, dtype, grad_dtype), expected, strict=True):
        assert torch.equal(ours, theirs) or not of_16(theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if ours.dtype == torch.bfloat16 else 1e-6, atol=1e-7)


def test_a_gradient_of_other_strides_is_read_as_its_numbers_lie():
    """torch's fused operator on a CPU does not."""
    g = torch.randn(6, 4).t()
    x, m, v = torch.randn(4, 6), torch.zeros(4, 6), torch.zeros(4, 6)
    adamw_([x], [g], [m], [v], 1, *HYPER.values())
    torch.testing.assert_close(m, 0.1 * g)


@pytest.fixture
def in_pieces(monkeypatch):
    """Pieces so small that threads get several of them."""
    monkeypatch.setattr("rowwise.kernels.host.PIECE_BLOCKS", 3)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


MANY = [(9, 700), (0, 512), (1, 1), (30, 512)]


def step_many():
    """All that a step changes of several tensors."""
    params, grads, *moments = operands(MANY, torch.bfloat16)
    adamw8bit_numba_(params, grads, *moments, 7, *HYPER.values(), [(i, 5 * i) for i in range(len(MANY))])
    return [*params, *flat(moments)]


def test_storages_stay_torchs_own():
    """What is not is taken for what lies in a file."""
    assert all(t.untyped_storage().resizable() for t in step_many())


def test_threads_and_pieces_change_nothing(in_pieces, two_threads, monkeypatch):
    there = threading.active_count()
    found = step_many()
    assert threading.active_count() == there
    torch.set_num_threads(1)
    monkeypatch.setattr("rowwise.kernels.host.PIECE_BLOCKS", 1 << 20)
    assert all(map(torch.equal, found, step_many()))


def test_two_steps_at_once_each_on_two_threads(in_pieces, two_threads):
    """As where states step beside the backward: neither of the callers is the main thread."""
    expected, found = step_many(), {}
    callers = [threading.Thread(target=lambda i=i: found.update({i: [step_many() for _ in range(20)]})) for i in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(all(map(torch.equal, expected, one)) for steps in found.values() for one in steps) and len(found) == 2


def test_a_fork_steps_as_its_parent(in_pieces, two_threads):
    expected = step_many()
    if not (child := os.fork()):
        torch.set_num_threads(1)  # OpenMP's threads stay with the parent: a fork of ours sets its own number
        os._exit(0 if all(map(torch.equal, expected, step_many())) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_was_compiled_is_kept_for_other_processes(monkeypatch):
    step_many()
    again = kernel(adamw8bit_kernel.py_func)
    monkeypatch.setattr("rowwise.kernels.adamw8bit_numba.adamw8bit_kernel", again)
    step_many()
    assert sum(again.stats.cache_hits.values()) == 1 and not again.stats.cache_misses


def spied(monkeypatch):
    """The public functions on 4,096 numbers, and which of them went to numba."""
    found = []
    for name in ("adamw8bit", "lion8bit"):
        module = f"rowwise.kernels.{name}_numba.{name}_numba_"
        monkeypatch.setattr(module, lambda *_, name=name: found.append(name))
    monkeypatch.setattr("rowwise.kernels.rounding_numba.round_numba_", lambda *_: found.append("rounding"))
    for dtype in (torch.float32, torch.float64):
        params, grads, *moments = operands([(4, 512)] * 2, dtype)
        adamw8bit_(params, grads, *moments, 7, **HYPER)
        lion8bit_(params, grads, moments[0], **LION)
    round_bf16_(torch.randn(4096), torch.empty(4096).bfloat16(), KEY, 0)
    return found


def test_enough_numbers_of_at_most_32_bits_go_to_numba(monkeypatch):
    assert spied(monkeypatch) == []
    monkeypatch.setattr(dispatch, "WORTH_NUMBA", 4096)
    assert spied(monkeypatch) == ["adamw8bit", "lion8bit", "rounding"]
    monkeypatch.setattr(dispatch, "WORTH_NUMBA", 4097)
    assert spied(monkeypatch) == []
    monkeypatch.setattr(dispatch, "WORTH_NUMBA", 0)
    monkeypatch.setenv("ROWWISE_KERNELS", "reference")
    assert spied(monkeypatch) == []


def test_without_numba_plain_torch_computes_and_why_is_said(monkeypatch):
    assert dispatch.host_kernels() is None
    monkeypatch.setattr(dispatch, "WORTH_NUMBA", 0)
    monkeypatch.setitem(sys.modules, "numba", None)
    dispatch.host_kernels.cache_clear()
    try:
        assert spied(monkeypatch) == []
        assert "pip install 'rowwise[host]'" in dispatch.host_kernels()
    finally:
        dispatch.host_kernels.cache_clear()
