"""The Triton form of `rowwise.kernels.dct`; the formulas stand there.

`column_squares` is a matrix product G D whose right side is made on the fly, a tile at a time, and whose result is
squared and summed in registers: neither D nor S exists. Each block of rows has its own row of partial sums, which are
added afterwards in a fixed order: no atomics, the same bits every time.

The product runs as 'tf32x3', three TF32 products on tensor cores that together keep float32's accuracy. Columns are
ranked by these sums, so plain TF32 (three digits) would choose other columns than the reference; 'ieee' is no more
accurate than needed either, but leaves the tensor cores idle.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.rounding_triton import rounded_to

ROWS, COLUMNS, DEPTH = 64, 64, 32  # the tile of S, and how much of the sum it takes at a time
ENTRIES = 16  # rows of D a program writes, COLUMNS wide


@triton.jit
def _cosine(phase, n):
    """cos(pi phase / (2n)) of whole numbers phase >= 0."""
    phase = phase % (4 * n)
    quarter = n - tl.minimum(phase, 4 * n - phase)
    return tl.sin(quarter.to(tl.float32) * (1.5707963267948966 / n))


@triton.jit
def columns_kernel(columns, out, n, rank, first_scale, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.load(columns + place, mask=place < rank, other=0)
    d = _cosine((2 * j[:, None] + 1) * k[None, :], n) * tl.where(k == 0, first_scale, scale)[None, :]
    inside = (j[:, None] < n) & (place[None, :] < rank)
    tl.store(out + j[:, None].to(tl.int64) * rank + place[None, :], rounded_to(d, out.dtype.element_ty), mask=inside)


@triton.jit
def squares_kernel(
    g, partial, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr
):
    """Writes partial[row block, k] = sum over the block's rows of (sum_j g[., j] cos(pi (2j + 1) k / (2n)))^2."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    within = (2 * inner[:, None] * k[None, :]) % (4 * n)  # the phase of row j of D is that of row `first` and this
    place = g + row[:, None].to(tl.int64) * n
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(STEPS):
        first = i * DEPTH
        start = ((2 * first + 1) * k.to(tl.int64)) % (4 * n)
        d = _cosine(start.to(tl.int32)[None, :] + within, n)
        j = first + inner
        tile = tl.load(place + j[None, :], mask=(row[:, None] < rows) & (j[None, :] < n), other=0.0).to(tl.float32)
        s = tl.dot(tile, d, s, input_precision="tf32x3")
    tl.store(partial + tl.program_id(1).to(tl.int64) * n + k, tl.sum(s * s, axis=0), mask=k < n)


def dct_columns_triton(n: int, columns: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    k = columns.to(device, torch.int64)
    out = torch.empty(n, len(k), dtype=dtype, device=device)
    if out.numel():
        grid = (triton.cdiv(n, ENTRIES), triton.cdiv(len(k), COLUMNS))
        columns_kernel[grid](k, out, n, len(k), math.sqrt(1 / n), math.sqrt(2 / n), ROWS=ENTRIES, COLUMNS=COLUMNS)
    return out


def column_squares_triton(g: Tensor) -> Tensor:
    m, n = g.shape
    blocks = triton.cdiv(m, ROWS)
    partial = torch.empty(blocks, n, dtype=torch.float32, device=g.device)
    if partial.numel():
        grid = (triton.cdiv(n, COLUMNS), blocks)
        squares_kernel[grid](g, partial, m, n, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, STEPS=triton.cdiv(n, DEPTH))
    squares = partial.sum(0, dtype=torch.float64) * (2 / n)
    squares[:1] /= 2
    return squares.float()
