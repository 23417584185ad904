"""The Triton form of `rowwise.kernels.rms_norm`; the formulas stand there.

A program takes a row, twice: for its mean, and for what follows of it. dw goes down the columns in a kernel of its own, in segments
of rows whose sums torch adds up: nothing is added up by atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.rms_norm import Normed
from rowwise.kernels.rounding_triton import rounded_to

WIDEST = 4096  # numbers of a row at a time
TILE = {"ROWS": 32, "WIDTH": 64}
SEGMENTS = 64  # of rows, at most


@triton.jit
def norm_kernel(x, weight, y, r, columns, eps, offset, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(STEPS):
        column = i * WIDTH + tl.arange(0, WIDTH)
        numbers = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        total += numbers * numbers
    scale = 1.0 / tl.sqrt_rn(tl.sum(total) / columns + eps)
    tl.store(r + row, scale)
    for i in range(STEPS):
        column = i * WIDTH + tl.arange(0, WIDTH)
        inside = column < columns
        numbers = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
        tl.store(y + row * columns + column, rounded_to(numbers * scale * w, y.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradient_kernel(dy, x, weight, r, dx, columns, offset, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(r + row)
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(STEPS):
        column = i * WIDTH + tl.arange(0, WIDTH)
        inside, place = column < columns, row * columns + column
        g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
        total += g * (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale)
    mean = tl.sum(total) / columns
    for i in range(STEPS):
        column = i * WIDTH + tl.arange(0, WIDTH)
        inside, place = column < columns, row * columns + column
        g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
        xr = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
        tl.store(dx + place, rounded_to((g - xr * mean) * scale, dx.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(dy, x, r, sums, rows, columns, per_segment, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums dy x r over the rows of a segment, for some columns."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    segment = tl.program_id(1)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, rows)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        scale = tl.load(r + row, mask=row < end, other=0.0)
        xr = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        total += tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * xr
    tl.store(sums + segment.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


def _steps(columns: int) -> dict[str, int]:
    """In how many steps, and how wide, a program goes through a row."""
    wide = min(WIDEST, max(16, triton.next_power_of_2(columns)))
    return {"STEPS": triton.cdiv(columns, wide), "WIDTH": wide}


def normed_triton(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Normed:
    x = x.contiguous()
    columns, y = x.size(-1), torch.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        norm_kernel[(r.numel(),)](x, weight.contiguous(), y, r, columns, eps, offset, **_steps(columns))
    return Normed(y, r)


def norm_gradients_triton(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, learns: bool = True, offset: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    (rows, columns), dx = (r.numel(), x.size(-1)), torch.empty_like(x)
    if x.numel():
        norm_gradient_kernel[(rows,)](dy, x, weight, r, dx, columns, offset, **_steps(columns))
    if not learns:
        return dx, None
    per_segment = triton.cdiv(triton.cdiv(max(rows, 1), SEGMENTS), TILE["ROWS"]) * TILE["ROWS"]
    sums = torch.zeros(triton.cdiv(rows, per_segment), columns, dtype=torch.float32, device=x.device)
    if x.numel():
        grid = triton.cdiv(columns, TILE["WIDTH"]), len(sums)
        weight_gradient_kernel[grid](dy, x, r, sums, rows, columns, per_segment, **TILE)
    return dx, sums.sum(0).to(weight.dtype)
