"""The RMS norm (Zhang & Sennrich, *Root Mean Square Layer Normalization*), which keeps for its backward what it must and no more.

    r = 1 / sqrt(mean(x^2) + eps)        y = w x r
    g = w dy        dx = r (g - x r mean(g x r))        dw = sum of dy x r over rows

Means are over the last dim. All of it is computed in float32, or float64 for float64, and rounded once. Kept: x, as it came, and
r, a number a row. (On a CPU torch's own operator keeps four tensors as large as x.) A compiled block on a GPU has torch's
operator, which the compiler puts together with what is around it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.dispatch import one_kernel
from rowwise.kernels.wide import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norms x (..., n) by its root mean square, and multiplies by weight (n,): (..., n), in the dtype of x. Communicates nothing."""
    if x.is_cuda and torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class Normed(NamedTuple):
    """`y` (..., n), in the dtype of x, and `r` (..., 1), at least float32."""

    y: Tensor
    r: Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        dx, dw = norm_gradients(dy, x, weight, r, ctx.needs_input_grad[1])
        return dx, dw, None


def normed(x: Tensor, weight: Tensor, eps: float) -> Normed:
    """Makes y and r of the formulas. Communicates nothing."""
    if one_kernel(x):
        from rowwise.kernels.rms_norm_triton import normed_triton

        return normed_triton(x, weight, eps)
    return normed_reference(x, weight, eps)


def normed_reference(x: Tensor, weight: Tensor, eps: float) -> Normed:
    """Makes y and r in plain torch."""
    wide_x = wide(x)
    r = wide_x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return Normed((wide_x * r).mul_(weight).to(x.dtype), r)


def norm_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, learns: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Makes dx, and dw where the weight `learns`, in the dtypes of x and of the weight. Communicates nothing."""
    if one_kernel(x):
        from rowwise.kernels.rms_norm_triton import norm_gradients_triton

        return norm_gradients_triton(dy, x, weight, r, learns)
    return norm_gradients_reference(dy, x, weight, r, learns)


def norm_gradients_reference(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, learns: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Makes dx and dw in plain torch."""
    xr, dy = wide(x) * r, wide(dy)
    dw = (dy * xr).flatten(0, -2).sum(0).to(weight.dtype) if learns else None
    g = dy * weight
    dx = g.sub_(xr.mul_((g * xr).mean(-1, keepdim=True))).mul_(r)
    return dx.to(x.dtype), dw
