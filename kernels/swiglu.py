"""The gate of a SwiGLU feed-forward (Shazeer, *GLU Variants Improve Transformer*).

    y = silu(g) u,  silu(g) = g sigmoid(g)        du = silu(g) dy        dg = u dy sigmoid(g) (1 + g (1 - sigmoid(g)))

Kept for the backward: g and u. silu(g), which autograd would keep too, is computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiplies `up` by silu of `gate`, number by number, in their dtype. Communicates nothing."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
