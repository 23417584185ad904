"""The RMS norm and SwiGLU: their formulas, torch's own numbers, and what they keep for the backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from rowwise.kernels.rms_norm import rms_norm
from rowwise.kernels.swiglu import swiglu

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
def test_a_gate_is_torchs_to_the_last_bit(dtype):
    given = random(3, 5, 17, dtype=dtype, seed=1), random(3, 5, 17, dtype=dtype, seed=2)
    for mine, other in zip(gradients(swiglu, *given), gradients(lambda g, u: F.silu(g) * u, *given), strict=True):
        assert torch.equal(mine, other)


def test_both_keep_what_they_are_given_and_a_number_a_row():
    x, w = random(4, 6, 32, dtype=torch.float32, seed=1), random(32, dtype=torch.float32, seed=2)
    assert kept(lambda x, w: rms_norm(x, w, 1e-5), x, w) == [24, 32, 24 * 32]
    assert kept(swiglu, x, random(4, 6, 32, dtype=torch.float32, seed=3)) == [24 * 32] * 2


def test_their_gradients_are_those_of_the_formulas():
    given = random(3, 8, dtype=torch.float64, seed=1), random(8, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), given)
    pair = random(3, 8, dtype=torch.float64, seed=1), random(3, 8, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(swiglu, pair)
