"""The Triton form of `rowwise.kernels.blockwise`; the formulas stand there.

A program takes BLOCKS blocks, wherever in the rows they lie: block b of the tensor is block b mod k of row b div k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks_per_row, code_book, code_table
from rowwise.kernels.rounding_triton import rounded_to

BLOCKS = 4  # 1,024 numbers: 8 a thread with Triton's four warps


@triton.jit
def block_places(rows, columns, per_row, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Returns of this program's blocks: number (BLOCKS,), place of the first element (BLOCKS,), places (BLOCKS, WIDTH), masks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % per_row) * WIDTH
    first = (block // per_row) * columns + column
    lane = tl.arange(0, WIDTH)
    exists = block < rows * per_row
    inside = exists[:, None] & (column[:, None] + lane[None, :] < columns)
    return block, first, first[:, None] + lane[None, :], exists, inside


@triton.jit
def decode(codes, absmax, book, block, place, exists, inside):
    """Returns the numbers (BLOCKS, WIDTH) float32 behind the codes."""
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    top = tl.load(absmax + block, mask=exists, other=0.0)
    return tl.load(book + code) * top[:, None]


@triton.jit
def largest(x, inside):
    """Returns the largest |x| of each block, (BLOCKS, 1): as whole numbers floats are in the order of |x|, with NaN above all."""
    bits = tl.where(inside, x, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def nearest(x, top, table):
    """Returns the codes (BLOCKS, WIDTH) int32 of x / top."""
    divisor = tl.where(top == 0, 1.0, top)
    key = tl.div_rn(x, tl.broadcast_to(divisor, x.shape)).to(tl.int32, bitcast=True)
    key = key ^ (key >> 31)
    return (tl.load(table + (key >> 16)) + key) >> 16


@triton.jit
def store_codes(code, top, codes, absmax, block, place, exists, inside):
    """Stores codes (BLOCKS, WIDTH) and the maxima (BLOCKS, 1) they are relative to."""
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(absmax + block[:, None], top, mask=exists[:, None])


@triton.jit
def encode(x, codes, absmax, table, block, place, exists, inside):
    """Quantises x (BLOCKS, WIDTH) float32 and stores codes and absmax."""
    top = largest(x, inside)
    store_codes(nearest(x, top, table), top, codes, absmax, block, place, exists, inside)


@triton.jit
def quantise_kernel(x, codes, absmax, table, rows, columns, per_row, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    block, _, place, exists, inside = block_places(rows, columns, per_row, BLOCKS, WIDTH)
    numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    encode(numbers, codes, absmax, table, block, place, exists, inside)


@triton.jit
def dequantise_kernel(codes, absmax, book, out, rows, columns, per_row, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    block, _, place, exists, inside = block_places(rows, columns, per_row, BLOCKS, WIDTH)
    numbers = decode(codes, absmax, book, block, place, exists, inside)
    tl.store(out + place, rounded_to(numbers, out.dtype.element_ty), mask=inside)


def programs(x: Tensor) -> tuple[int]:
    """Returns the grid of a kernel over the blocks of x (m, n)."""
    return (triton.cdiv(x.size(0) * blocks_per_row(x.size(1)), BLOCKS),)


def quantise_triton_(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    if x.numel():
        table, (m, n) = code_table(signed, x.device), x.shape
        quantise_kernel[programs(x)](x, codes, absmax, table, m, n, blocks_per_row(n), BLOCKS=BLOCKS, WIDTH=BLOCK)


def dequantise_triton_(codes: Tensor, absmax: Tensor, signed: bool, out: Tensor) -> None:
    if codes.numel():
        book, (m, n) = code_book(signed, codes.device, torch.float32), codes.shape
        dequantise_kernel[programs(codes)](
            codes, absmax, book, out, m, n, blocks_per_row(n), BLOCKS=BLOCKS, WIDTH=BLOCK
        )
