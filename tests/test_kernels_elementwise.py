"""The RMS norm and gates: their formulas, torch's own numbers, what they keep for the backward, Triton against torch. (Law 1.)"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from interpreter import interpreted
from rowwise.kernels import dispatch
from rowwise.kernels import glu as gates
from rowwise.kernels import rms_norm as norms
from rowwise.kernels.glu import gate_gradients_reference, gated_reference, glu
from rowwise.kernels.rms_norm import norm_gradients_reference, normed_reference, rms_norm
from rowwise.kernels.wide import wide_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NEAR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(function, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = function(*given)
    return y, *torch.autograd.grad(y, given, random(*y.shape, dtype=y.dtype, seed=9))


def kept(function, *given: torch.Tensor) -> list[int]:
    """The numbers of each tensor that is kept, each storage once."""
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.itemsize
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = function(*given)
    del y
    return sorted(found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 30), (2, 3, 4, 7), (3, 1, 64), (0, 8)], ids=str)
def test_a_norm_is_torchs(shape, dtype):
    given = random(*shape, dtype=dtype, seed=1), random(shape[-1], dtype=dtype, seed=2)
    ours = gradients(lambda x, w: rms_norm(x, w, 1e-5), *given)
    theirs = gradients(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), *given)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=NEAR[dtype], atol=NEAR[dtype])
    assert torch.equal(ours[0], theirs[0]) or dtype != torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_an_offset_is_that_of_the_whole_factor(dtype):
    """The sum is at least float32, as Gemma's: 1 + 2^-9 is no number of bfloat16."""
    x, w = random(5, 30, dtype=dtype, seed=1), random(30, dtype=dtype, seed=2)
    ours = gradients(lambda x, w: rms_norm(x, w, 1e-5, 1.0), x, w)
    wide = wide_dtype(dtype)
    theirs = gradients(lambda x, w: F.rms_norm(x.to(wide), w.shape, 1.0 + w.to(wide), 1e-5).to(dtype), x, w)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=NEAR[dtype], atol=NEAR[dtype])


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_is_torchs_to_the_last_bit(dtype, activation):
    given = random(3, 5, 17, dtype=dtype, seed=1), random(3, 5, 17, dtype=dtype, seed=2)
    ours = gradients(lambda g, u: glu(g, u, activation), *given)
    for mine, other in zip(ours, gradients(lambda g, u: ACTIVATIONS[activation](g) * u, *given), strict=True):
        assert torch.equal(mine, other)


def test_both_keep_what_they_are_given_and_a_number_a_row():
    x, w = random(4, 6, 32, dtype=torch.float32, seed=1), random(32, dtype=torch.float32, seed=2)
    assert kept(lambda x, w: rms_norm(x, w, 1e-5), x, w) == [24, 32, 24 * 32]
    assert kept(glu, x, random(4, 6, 32, dtype=torch.float32, seed=3)) == [24 * 32] * 2


def test_their_gradients_are_those_of_the_formulas():
    given = random(3, 8, dtype=torch.float64, seed=1), random(8, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, 1.0), given)
    pair = random(3, 8, dtype=torch.float64, seed=1), random(3, 8, dtype=torch.float64, seed=2)
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda g, u, a=activation: glu(g, u, a), pair)


# A row in one step and in two; rows of one segment and of several; nothing.
SHAPES = [(5, 30), (2, 1, 64), (1, 1), (34, 3), (2, 4100), (0, 8)]


def check_norm():
    from rowwise.kernels import rms_norm_triton

    rms_norm_triton.SEGMENTS = 2  # so that few rows are several
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.float32, (torch.bfloat16, torch.float16)[number % 2]):
            x, w, dy = (
                random(*shape[i:], dtype=dtype, seed=s).detach() for i, s in ((0, 1), (len(shape) - 1, 2), (0, 3))
            )
            offset = shape[0] % 2  # of some shapes
            ours, right = (form(x, w, 1e-5, offset) for form in (rms_norm_triton.normed_triton, normed_reference))
            torch.testing.assert_close(ours.r, right.r, rtol=2e-6, atol=0)
            assert_near(ours.y, right.y, dtype)
            gradients = rms_norm_triton.norm_gradients_triton(dy, x, w, right.r, True, offset)
            for mine, other in zip(gradients, norm_gradients_reference(dy, x, w, right.r, True, offset), strict=True):
                assert_near(mine, other, dtype)
            assert rms_norm_triton.norm_gradients_triton(dy, x, w, right.r, learns=False)[1] is None


def check_gate():
    from rowwise.kernels.glu_triton import gate_gradients_triton, gated_triton

    both = itertools.product([(3, 5, 17), (1, 1), (2, 1030), (0, 8)], ACTIVATIONS)
    for number, (shape, activation) in enumerate(both):
        for dtype in (torch.float32, (torch.bfloat16, torch.float16)[number // 2 % 2]):
            gate, up, dy = (
                random(*shape, dtype=dtype, seed=seed).detach() * size for seed, size in ((1, 4), (2, 1), (3, 1))
            )
            assert_near(gated_triton(gate, up, activation), gated_reference(gate, up, activation), dtype)
            apart = gate_gradients_triton(dy.mT.contiguous().mT, gate, up, activation)  # as a backward may bring it
            for mine, other in zip(apart, gate_gradients_reference(dy, gate, up, activation), strict=True):
                assert_near(mine, other, dtype)


def assert_near(ours: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    """To float32's rounding, or to the last place of 16 bits."""
    assert ours.dtype == right.dtype == dtype and ours.shape == right.shape
    last = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(ours, right, rtol=last, atol=last * 2)


@pytest.mark.parametrize("check", ["check_norm", "check_gate"])
def test_triton_agrees_with_torch(check):
    interpreted("test_kernels_elementwise", check)


def test_on_a_gpu_they_are_tritons(monkeypatch):
    """But in 64 bits, and where a compiler makes kernels itself."""
    x, w = random(2, 8, dtype=torch.float32, seed=1), random(8, dtype=torch.float32, seed=2)
    asked = []
    monkeypatch.setattr(dispatch, "use_triton", lambda device: asked.append(device) or False)
    gradients(lambda x, w: rms_norm(x, w, 1e-5), x, w)
    gradients(glu, x, x.detach().requires_grad_())
    assert len(asked) == 4  # forward and backward of both
    gradients(glu, x.double().detach().requires_grad_(), x.double().detach().requires_grad_())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gates.gated(x, x), norms.normed(x, w, 1e-5)
    assert len(asked) == 4


def test_a_compiler_sees_them_whole():
    """Nothing of the choice between forms is left to Python in its graph."""
    x, w = random(2, 8, dtype=torch.float32, seed=1), random(8, dtype=torch.float32, seed=2)
    compiled = torch.compile(lambda x, w: glu(rms_norm(x, w, 1e-5), x), backend="eager", fullgraph=True)
    for mine, other in zip(
        gradients(compiled, x, w), gradients(lambda x, w: glu(rms_norm(x, w, 1e-5), x), x, w), strict=True
    ):
        assert torch.equal(mine, other)
