"""The RMS norm (Zhang & Sennrich, *Root Mean Square Layer Normalization*), which keeps for its backward what it must and no more.

    r = 1 / sqrt(mean(x^2) + eps)        y = w x r
    g = w dy        dx = r (g - x r mean(g x r))        dw = sum of dy x r over rows

Means are over the last dim. All of it is computed in float32, or float64 for float64, and rounded once. Kept: x, as it came, and
r, a number a row. (torch's own operator on CUDA keeps the same, and is used there; on a CPU torch keeps four tensors as large as x.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.wide import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norms x (..., n) by its root mean square, and multiplies by weight (n,): (..., n), in the dtype of x. Communicates nothing."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide_x = wide(x)
        r = wide_x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide_x * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        normed, dy = wide(x) * r, wide(dy)
        dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = dy * weight
        dx = g.sub_(normed.mul_((g * normed).mean(-1, keepdim=True))).mul_(r)
        return dx.to(x.dtype), dw, None
