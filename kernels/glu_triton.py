"""The Triton form of `rowwise.kernels.glu`; the formulas stand there, and what is rounded. A program takes NUMBERS numbers.

GELU's tanh is a sigmoid: 1/2 (1 + tanh(z)) = sigmoid(2 z).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.glu import ACTIVATION
from rowwise.kernels.rounding_triton import rounded_to

NUMBERS = 1024


@triton.jit
def bent(g, GELU: tl.constexpr):
    """Makes z of a(g) = g sigmoid(z): g, or GELU's 2 c (g + 0.044715 g^3), with c = sqrt(2 / pi)."""
    return 1.5957691216057308 * g * (1.0 + 0.044715 * g * g) if GELU else g


@triton.jit
def steepness(g, GELU: tl.constexpr):
    """Makes dz / dg."""
    return 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * g * g) if GELU else 1.0


@triton.jit
def gate_kernel(gate, up, y, count, GELU: tl.constexpr, NUMBERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < count
    dtype: tl.constexpr = y.dtype.element_ty
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    a = rounded_to(g / (1.0 + tl.exp(-bent(g, GELU))), dtype).to(tl.float32)
    tl.store(y + place, rounded_to(a * u, dtype), mask=inside)


@triton.jit
def gate_gradient_kernel(dy, gate, up, dg, du, count, GELU: tl.constexpr, NUMBERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < count
    dtype: tl.constexpr = dg.dtype.element_ty
    given = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-bent(g, GELU)))
    of_a = rounded_to(given * u, dtype).to(tl.float32)
    slope = 1.0 + g * (1.0 - sigmoid) * steepness(g, GELU)
    tl.store(dg + place, rounded_to(of_a * sigmoid * slope, dtype), mask=inside)
    a = rounded_to(g / (1.0 + tl.exp(-bent(g, GELU))), dtype).to(tl.float32)
    tl.store(du + place, rounded_to(a * given, dtype), mask=inside)


def gated_triton(gate: Tensor, up: Tensor, activation: ACTIVATION = "silu") -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        grid = (triton.cdiv(y.numel(), NUMBERS),)
        gate_kernel[grid](gate, up, y, y.numel(), GELU=activation == "gelu_tanh", NUMBERS=NUMBERS)
    return y


def gate_gradients_triton(
    dy: Tensor, gate: Tensor, up: Tensor, activation: ACTIVATION = "silu"
) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dg, du = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        grid = (triton.cdiv(dy.numel(), NUMBERS),)
        gate_gradient_kernel[grid](dy, gate, up, dg, du, dy.numel(), GELU=activation == "gelu_tanh", NUMBERS=NUMBERS)
    return dg, du
