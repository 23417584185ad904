"""The Triton form of `rowwise.kernels.swiglu`; the formulas stand there, and what is rounded. A program takes NUMBERS numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.rounding_triton import rounded_to

NUMBERS = 1024


@triton.jit
def gate_kernel(gate, up, y, count, NUMBERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < count
    dtype: tl.constexpr = y.dtype.element_ty
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    silu = rounded_to(g / (1.0 + tl.exp(-g)), dtype).to(tl.float32)
    tl.store(y + place, rounded_to(silu * u, dtype), mask=inside)


@triton.jit
def gate_gradient_kernel(dy, gate, up, dg, du, count, NUMBERS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < count
    dtype: tl.constexpr = dg.dtype.element_ty
    given = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    of_silu = rounded_to(given * u, dtype).to(tl.float32)
    tl.store(dg + place, rounded_to(of_silu * sigmoid * (1.0 + g * (1.0 - sigmoid)), dtype), mask=inside)
    silu = rounded_to(g / (1.0 + tl.exp(-g)), dtype).to(tl.float32)
    tl.store(du + place, rounded_to(silu * given, dtype), mask=inside)


def gated_triton(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        gate_kernel[(triton.cdiv(y.numel(), NUMBERS),)](gate, up, y, y.numel(), NUMBERS=NUMBERS)
    return y


def gate_gradients_triton(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dg, du = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        gate_gradient_kernel[(triton.cdiv(dy.numel(), NUMBERS),)](dy, gate, up, dg, du, dy.numel(), NUMBERS=NUMBERS)
    return dg, du
