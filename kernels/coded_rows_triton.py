"""The Triton form of `rowwise.kernels.coded_rows`: the numbers behind codes; the formulas stand there.

A program takes BLOCKS blocks, wherever in the rows they lie: block b of the matrix is block b mod J of row b div J. Their scales, of
which there are few, are decoded before.
"""

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.coded_rows import RowForm, numbers_of, scales_of
from rowwise.kernels.rounding_triton import rounded_to

NUMBERS = 1024  # of a program


@triton.jit
def decode_kernel(
    codes, scales, book, out, rows, columns, per_row, row_bytes, code_bytes,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row, number = block // per_row, block % per_row
    exists = row < rows
    column = number[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = exists[:, None] & (column < columns)
    byte, bit = column * BITS // 8, column * BITS % 8
    place = codes + row[:, None] * row_bytes + byte
    window = tl.load(place, mask=inside, other=0).to(tl.int32) << 8
    if 8 % BITS != 0:  # a code may lie in two bytes
        window = window | tl.load(place + 1, mask=inside & (byte + 1 < code_bytes), other=0).to(tl.int32)
    code = (window >> (16 - BITS - bit).to(tl.int32)) & ((1 << BITS) - 1)
    scale = tl.load(scales + block, mask=exists, other=0.0)
    x = tl.load(book + code) * scale[:, None]
    tl.store(out + row[:, None] * columns + column, rounded_to(x, out.dtype.element_ty), mask=inside)


def decode_triton_(packed: Tensor, out: Tensor, form: RowForm) -> None:
    (rows, columns), per_row = out.shape, form.blocks(out.size(1))
    if out.numel():
        parts = form.parts(packed, columns)
        blocks, codes = max(1, NUMBERS // form.block), parts.codes
        decode_kernel[(triton.cdiv(rows * per_row, blocks),)](
            codes, scales_of(parts, form).contiguous(), numbers_of(form.numbers, form.bits, codes.device), out, rows, columns,
            per_row, packed.stride(0), codes.size(1), BITS=form.bits, BLOCKS=blocks, WIDTH=form.block,
        )  # fmt: skip
