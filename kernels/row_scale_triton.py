"""The Triton form of `rowwise.kernels.row_scale`; the formula stands there. One program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024


@triton.jit
def scale_rows_kernel(
    numerator,
    denominator,
    x,
    y,
    squares,
    rank,
    columns,
    RANK_STEPS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes row i of y and its sum of squares: sums in a fixed order, without atomics."""
    row = tl.program_id(0).to(tl.int64)
    top, bottom = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for i in range(RANK_STEPS):
        column = i * WIDTH + tl.arange(0, WIDTH)
        above = tl.load(numerator + row * rank + column, mask=column < rank, other=0.0).to(tl.float32)
        below = tl.load(denominator + row * rank + column, mask=column < rank, other=0.0).to(tl.float32)
        top += above * above
        bottom += below * below
    norm = tl.sqrt_rn(tl.sum(bottom))
    ratio = tl.where(norm > 0, tl.div_rn(tl.sqrt_rn(tl.sum(top)), norm), 0.0)
    total = tl.zeros([WIDTH], tl.float32)
    for i in range(STEPS):
        column = i * WIDTH + tl.arange(0, WIDTH)
        place = row * columns + column
        scaled = tl.load(x + place, mask=column < columns, other=0.0).to(tl.float32) * ratio
        tl.store(y + place, scaled, mask=column < columns)
        total += scaled * scaled
    tl.store(squares + row, tl.sum(total))


def scale_rows_triton(numerator: Tensor, denominator: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=torch.float32)
    squares = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    (m, n), rank = x.shape, numerator.size(1)
    if m:
        steps = {"RANK_STEPS": triton.cdiv(rank, WIDTH), "STEPS": triton.cdiv(n, WIDTH), "WIDTH": WIDTH}
        scale_rows_kernel[(m,)](numerator, denominator, x, y, squares, rank, n, **steps)
    return y, squares.sum(dtype=torch.float64).float()
