"""The Triton form of `rowwise.kernels.row_codes`; the formulas stand there.

A program takes BLOCKS blocks, wherever in the rows they lie: block b of the tensor is block b mod J of row b div J, and row r is row
r mod R of slice r div R.
"""

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.philox_triton import signed_64
from rowwise.kernels.rounding_triton import WORDS, random_16, rounded_to
from rowwise.kernels.row_codes import WIDTH, Draws, blocks_of

BLOCKS = 4  # of a program


@triton.jit
def _places(slices, rows, columns, per_row, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Of this program's blocks: slice, row within it, block within that (BLOCKS,), and masks of blocks and numbers."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row, number = block // per_row, block % per_row
    exists = row < slices * rows
    inside = exists[:, None] & (number[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :] < columns)
    return row // rows, row % rows, number, exists, inside


@triton.jit
def encode_kernel(
    x, codes, scales, slices, rows, columns, per_row, code_columns, x_slice, codes_slice, scales_slice, key, start,
    RANDOM: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    infinity: tl.constexpr = float("inf")
    largest: tl.constexpr = 127.0 if BITS == 8 else 7.0
    outer, row, number, exists, inside = _places(slices, rows, columns, per_row, BLOCKS, WIDTH)
    lane = tl.arange(0, WIDTH)[None, :]
    place = (outer * x_slice + row * columns + number * WIDTH)[:, None] + lane
    numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    usual = tl.min((tl.abs(numbers) < infinity).to(tl.int32), axis=1)  # NaN is not below infinity
    scale = tl.div_rn(tl.max(tl.abs(numbers), axis=1), tl.full((BLOCKS,), largest, tl.float32))
    scale = tl.where(usual != 0, tl.where(scale < 1.1754943508222875e-38, 0.0, scale), float("nan"))
    tl.store(scales + outer * scales_slice + row * per_row + number, scale, mask=exists)
    usable = (scale > 0)[:, None]
    divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], (BLOCKS, WIDTH))
    y = tl.where(usable, tl.div_rn(numbers, divisor), 0.0)
    if RANDOM:
        first = start + (outer * rows + row) * columns + number * WIDTH
        below = tl.floor(y)
        up = (y - below) * 65536.0 > random_16(key, first, WIDTH, ALIGNED).to(tl.float32) + 0.5
        y = below + tl.where(up, 1.0, 0.0)
    y = (y + 12582912.0) - 12582912.0  # 1.5 x 2^23, beyond which float32 has no fractions: to nearest, ties to even
    y = tl.minimum(tl.maximum(y, -largest), largest)
    code = (y + (largest + 1.0)).to(tl.int32)
    if BITS == 8:
        at = (outer * codes_slice + row * code_columns + number * WIDTH)[:, None] + lane
        tl.store(codes + at, code.to(tl.uint8), mask=inside)
    else:
        lower, upper = tl.split(tl.reshape(code, (BLOCKS, WIDTH // 2, 2)))
        pair = number[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        at = (outer * codes_slice + row * code_columns)[:, None] + pair
        tl.store(codes + at, (lower | (upper << 4)).to(tl.uint8), mask=exists[:, None] & (pair < code_columns))


@triton.jit
def decode_kernel(
    codes, scales, out, slices, rows, columns, per_row, code_columns, out_slice, codes_slice, scales_slice,
    ADD: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    outer, row, number, exists, inside = _places(slices, rows, columns, per_row, BLOCKS, WIDTH)
    column = number[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    base = (outer * codes_slice + row * code_columns)[:, None]
    if BITS == 8:
        code = tl.load(codes + base + column, mask=inside, other=0).to(tl.int32) - 128
    else:
        byte = tl.load(codes + base + column // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(column % 2 == 0, byte & 15, byte >> 4) - 8
    scale = tl.load(scales + outer * scales_slice + row * per_row + number, mask=exists, other=0.0)
    numbers = code.to(tl.float32) * scale[:, None]
    place = (outer * out_slice + row * columns)[:, None] + column
    if ADD:
        numbers += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, rounded_to(numbers, out.dtype.element_ty), mask=inside)


def encode_triton_(x: Tensor, codes: Tensor, scales: Tensor, bits: int, draws: Draws | None = None) -> None:
    (slices, rows, columns), per_row = x.shape, blocks_of(x.size(2))
    if x.numel():
        key, start = (0, 0) if draws is None else draws
        aligned = start % WORDS == 0 and columns % WORDS == 0
        encode_kernel[(triton.cdiv(slices * rows * per_row, BLOCKS),)](
            x, codes, scales, slices, rows, columns, per_row, codes.size(2), x.stride(0), codes.stride(0), scales.stride(0),
            signed_64(key), start, RANDOM=draws is not None, ALIGNED=aligned, BITS=bits, BLOCKS=BLOCKS, WIDTH=WIDTH,
        )  # fmt: skip


def decode_triton_(codes: Tensor, scales: Tensor, out: Tensor, bits: int, add: bool = False) -> None:
    (slices, rows, columns), per_row = out.shape, blocks_of(out.size(2))
    if out.numel():
        decode_kernel[(triton.cdiv(slices * rows * per_row, BLOCKS),)](
            codes, scales, out, slices, rows, columns, per_row, codes.size(2), out.stride(0), codes.stride(0), scales.stride(0),
            ADD=add, BITS=bits, BLOCKS=BLOCKS, WIDTH=WIDTH,
        )  # fmt: skip
