"""The gate of a SwiGLU feed-forward (Shazeer, *GLU Variants Improve Transformer*).

    y = silu(g) u,  silu(g) = g sigmoid(g)        du = silu(g) dy        dg = u dy sigmoid(g) (1 + g (1 - sigmoid(g)))

silu(g), y, u dy, du and dg are each rounded to the dtype of g and u, as torch's operators round. Kept for the backward: g and u.
silu(g), which autograd would keep too, is computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.dispatch import one_kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiplies `up` by silu of `gate`, number by number, in their dtype. Communicates nothing."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate_gradients(dy, gate, up)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Makes y of the formulas. Communicates nothing."""
    if one_kernel(gate):
        from rowwise.kernels.swiglu_triton import gated_triton

        return gated_triton(gate, up)
    return gated_reference(gate, up)


def gated_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Makes y in plain torch."""
    return F.silu(gate) * up


def gate_gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Makes dg and du of the formulas. Communicates nothing."""
    if one_kernel(gate):
        from rowwise.kernels.swiglu_triton import gate_gradients_triton

        return gate_gradients_triton(dy, gate, up)
    return gate_gradients_reference(dy, gate, up)


def gate_gradients_reference(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Makes dg and du in plain torch."""
    return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
