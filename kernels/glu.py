"""The gate of a gated feed-forward (Shazeer, *GLU Variants Improve Transformer*): SwiGLU, or GEGLU with the tanh form of GELU
(Hendrycks & Gimpel, *Gaussian Error Linear Units*).

    y = a(g) u        du = a(g) dy        dg = u dy a'(g)

    silu        a(g) = g sigmoid(g)         a'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
    gelu_tanh   a(g) = g / 2 (1 + tanh(c (g + 0.044715 g^3))),  c = sqrt(2 / pi)

a(g), y, u dy, du and dg are each rounded to the dtype of g and u, as torch's operators round. Kept for the backward: g and u.
a(g), which autograd would keep too, is computed again.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.dispatch import one_kernel

ACTIVATION = Literal["silu", "gelu_tanh"]


def glu(gate: Tensor, up: Tensor, activation: ACTIVATION = "silu") -> Tensor:
    """Multiplies `up` by the activation of `gate`, number by number, in their dtype. Communicates nothing."""
    return _GLU.apply(gate, up, activation)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: ACTIVATION) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *gate_gradients(dy, gate, up, ctx.activation), None


def gated(gate: Tensor, up: Tensor, activation: ACTIVATION = "silu") -> Tensor:
    """Makes y of the formulas. Communicates nothing."""
    if one_kernel(gate):
        from rowwise.kernels.glu_triton import gated_triton

        return gated_triton(gate, up, activation)
    return gated_reference(gate, up, activation)


def gated_reference(gate: Tensor, up: Tensor, activation: ACTIVATION = "silu") -> Tensor:
    """Makes y in plain torch."""
    return activated(gate, activation) * up


def activated(gate: Tensor, activation: ACTIVATION) -> Tensor:
    """Makes a(g) in plain torch."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gate_gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: ACTIVATION = "silu") -> tuple[Tensor, Tensor]:
    """Makes dg and du of the formulas. Communicates nothing."""
    if one_kernel(gate):
        from rowwise.kernels.glu_triton import gate_gradients_triton

        return gate_gradients_triton(dy, gate, up, activation)
    return gate_gradients_reference(dy, gate, up, activation)


def gate_gradients_reference(
    dy: Tensor, gate: Tensor, up: Tensor, activation: ACTIVATION = "silu"
) -> tuple[Tensor, Tensor]:
    """Makes dg and du in plain torch."""
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
    return d_gate, activated(gate, activation).mul_(dy)
