"""The Triton form of `rowwise.kernels.moment_pair`; the formulas stand there."""

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks_per_row, code_book, code_table
from rowwise.kernels.blockwise_triton import BLOCKS, block_places, decode, largest, nearest, programs, store_codes
from rowwise.kernels.moment_pair import LOSS, NEAR, SLACK, ZERO, Moment

_NEAR, _LOSS, _SLACK, _ZERO = (tl.constexpr(number) for number in (NEAR, LOSS, SLACK, ZERO))


@triton.jit
def decode_pair(
    avg_codes, avg_absmax, sq_codes, sq_absmax, avg_book, sq_book, block, place, exists, inside
):  # fmt: skip
    """Returns the moments m and v, (BLOCKS, WIDTH) float32 each; m is 0 where v is."""
    m = decode(avg_codes, avg_absmax, avg_book, block, place, exists, inside)
    v = decode(sq_codes, sq_absmax, sq_book, block, place, exists, inside)
    return tl.where(v == 0, 0.0, m), v


@triton.jit
def encode_pair(
    m, v, avg_codes, avg_absmax, sq_codes, sq_absmax, avg_book, avg_table, sq_book, sq_table,
    block, place, exists, inside
):  # fmt: skip
    """Rounds m and v (BLOCKS, WIDTH) float32 together and stores their codes and absmax."""
    ratio = tl.where(v == 0, 0.0, tl.div_rn(tl.abs(m), tl.where(v == 0, 1.0, tl.sqrt_rn(v))))
    most = largest(ratio, inside)
    top = largest(v, inside)
    code = nearest(v, top, sq_table)
    short = tl.load(sq_book + code) * top * _LOSS < v
    code += (short & ((ratio > most * _NEAR) | (code == 0))).to(tl.int32)
    store_codes(code, top, sq_codes, sq_absmax, block, place, exists, inside)
    limit = tl.sqrt_rn(tl.load(sq_book + code) * top) * (most * _SLACK)
    m = tl.where(m > limit, limit, m)
    m = tl.where(m < -limit, -limit, m)
    top = largest(m, inside)
    code = nearest(m, top, avg_table)
    outside = tl.abs(tl.load(avg_book + code) * top) > limit
    code += tl.where(outside, tl.where(code > _ZERO, -1, tl.where(code < _ZERO, 1, 0)), 0)
    store_codes(code, top, avg_codes, avg_absmax, block, place, exists, inside)


@triton.jit
def quantise_pair_kernel(
    m, v, avg_codes, avg_absmax, sq_codes, sq_absmax, avg_book, avg_table, sq_book, sq_table,
    rows, columns, per_row, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    block, _, place, exists, inside = block_places(rows, columns, per_row, BLOCKS, WIDTH)
    first = tl.load(m + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(v + place, mask=inside, other=0.0).to(tl.float32)
    encode_pair(
        first, second, avg_codes, avg_absmax, sq_codes, sq_absmax, avg_book, avg_table, sq_book, sq_table,
        block, place, exists, inside
    )  # fmt: skip


def quantise_pair_triton_(m: Tensor, v: Tensor, first: Moment, second: Moment) -> None:
    if m.numel():
        books = [make(signed, m.device) for signed in (True, False) for make in (code_book, code_table)]
        sizes = (m.size(0), m.size(1), blocks_per_row(m.size(1)))
        quantise_pair_kernel[programs(m)](m, v, *first, *second, *books, *sizes, BLOCKS=BLOCKS, WIDTH=BLOCK)
