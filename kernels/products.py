"""Products of float32 matrices by tensor cores, to float32's own precision.

A GPU multiplies float32 in full many times slower than TF32, whose operands keep 11 bits of the mantissa's 24. Three TF32
products keep 22 (Ootomo & Yokota, *Recovering Single Precision Accuracy from Tensor Cores*, without its scaling):

    x = high(x) + low(x),  high(x) = x rounded to TF32        a b = high(a) high(b) + (high(a) low(b) + low(a) high(b))

Muon's orthogonalised matrix beside float64's, relative error, where singular values of 600 x 200 spread over six powers of
ten: float32 1.2e-4, three TF32 products 1.3e-4, one 0.10, three bfloat16 products 2e-3, one 1.3.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Computes a b for (..., m, k) and (..., k, n) of one dtype: float32 on CUDA by three TF32 products, all else as it is.

    On CUDA it holds a second copy of both operands for the while. Local: communicates nothing.
    """
    if a.dtype != torch.float32 or a.device.type != "cuda":
        return a @ b
    with float32_products("high"):
        return three_products(a, b)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b for (m, n), (m, k) and (k, n): where `out` is float32 and the others have 16 bits, their product is not rounded to
    16 bits before it is added.

    A GPU's tensor cores do so by themselves; elsewhere it holds float32 copies of a and b for the while. Communicates nothing.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= (8, 0):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def three_products(a: Tensor, b: Tensor) -> Tensor:
    """Computes a b by products that may each round their operands to TF32: the parts have no more bits, so nothing is rounded."""
    a_high, b_high = to_tf32(a), to_tf32(b)
    small = a_high @ (b - b_high)
    small += (a - a_high) @ b_high
    return small.add_(a_high @ b_high)


def to_tf32(x: Tensor) -> Tensor:
    """Returns the nearest float32 numbers that have TF32's 10 bits behind the point, ties to even; numbers near float32's largest
    may become infinite."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Has float32 products on CUDA computed, while entered, in full (`highest`) or in TF32 (`high`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
