"""The RMS norm (Zhang & Sennrich, *Root Mean Square Layer Normalization*), which keeps for its backward what it must and no more.

    r = 1 / sqrt(mean(x^2) + eps)        y = (o + w) x r
    g = (o + w) dy        dx = r (g - x r mean(g x r))        dw = sum of dy x r over rows

The offset o is 0, or 1 where the weight is the factor's distance from 1 (Gemma's). Means are over the last dim. All of it is computed
in float32, or float64 for float64, and rounded once. Kept: x, as it came, and r, a number a row. (On a CPU torch's own operator keeps
four tensors as large as x.) A compiled block on a GPU has torch's operator, which the compiler puts together with what is around it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.dispatch import one_kernel
from rowwise.kernels.wide import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Norms x (..., n) by its root mean square, and multiplies by offset + weight (n,): (..., n), in the dtype of x. Communicates
    nothing."""
    if x.is_cuda and torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, factor(weight, offset), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps, offset)


def factor(weight: Tensor, offset: float) -> Tensor:
    """Gives o + w, at least float32; without an offset w as it is."""
    return wide(weight) + offset if offset else weight


class Normed(NamedTuple):
    """`y` (..., n), in the dtype of x, and `r` (..., 1), at least float32."""

    y: Tensor
    r: Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, r = normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, r = ctx.saved_tensors
        dx, dw = norm_gradients(dy, x, weight, r, ctx.needs_input_grad[1], ctx.offset)
        return dx, dw, None, None


def normed(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Normed:
    """Makes y and r of the formulas. Communicates nothing."""
    if one_kernel(x):
        from rowwise.kernels.rms_norm_triton import normed_triton

        return normed_triton(x, weight, eps, offset)
    return normed_reference(x, weight, eps, offset)


def normed_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Normed:
    """Makes y and r in plain torch."""
    wide_x = wide(x)
    r = wide_x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return Normed((wide_x * r).mul_(factor(weight, offset)).to(x.dtype), r)


def norm_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, learns: bool = True, offset: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Makes dx, and dw where the weight `learns`, in the dtypes of x and of the weight. Communicates nothing."""
    if one_kernel(x):
        from rowwise.kernels.rms_norm_triton import norm_gradients_triton

        return norm_gradients_triton(dy, x, weight, r, learns, offset)
    return norm_gradients_reference(dy, x, weight, r, learns, offset)


def norm_gradients_reference(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, learns: bool = True, offset: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Makes dx and dw in plain torch."""
    xr, dy = wide(x) * r, wide(dy)
    dw = (dy * xr).flatten(0, -2).sum(0).to(weight.dtype) if learns else None
    g = dy * factor(weight, offset)
    dx = g.sub_(xr.mul_((g * xr).mean(-1, keepdim=True))).mul_(r)
    return dx.to(x.dtype), dw
