"""Codes of rows on their way to other ranks (Wang et al., *ZeRO++: Extremely Efficient Collective Communication for Giant Model
Training*): 8 or 4 bits a number, with one scale for every 256 of a row.

    s = max |x| / q        q = 127 in 8 bits, 7 in 4        code = round(x / s)        x^ = s code

A scale is of numbers of one row, so that any rows of a matrix have the codes that they have within the whole. Rounding is to
nearest, ties to even, or at random by a counter stream: then x^ is x on the mean (to 16 bits), since the largest of a block
is a code itself and none is cut off. (DeepSpeed's s is max |x| / (q + 1), finer by that, and its codes end at q: a largest
number above 0 loses 1 / (q + 1) of itself, so that none of its roundings is right on the mean. Its codes and these differ by
one at most.)

A byte holds code + 128, or two neighbours' code + 8, the first in its lower half. Blocks in which a number is not finite come
back as NaN, and those in which |x| / q is below float32's least normal number as zeros.

Shapes: S slices of R rows of C numbers, any distance between slices, in J = ceil(C / 256) blocks. All arithmetic is in float32, of
float64 in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import row_portions
from rowwise.kernels.rounding import random_16
from rowwise.kernels.wide import wide_dtype

WIDTH = 256  # numbers of a block
LEAST = torch.finfo(torch.float32).tiny  # of a scale


class Draws(NamedTuple):
    """The random bits by which numbers are rounded: x[s, r, c] takes element `start` + (s R + r) C + c of the stream `key`."""

    key: int
    start: int


def blocks_of(columns: int) -> int:
    """Counts the scales of a row."""
    return -(-columns // WIDTH)


def code_bytes(columns: int, bits: int) -> int:
    """Counts the bytes that the codes of a row take."""
    return -(-columns * bits // 8)


def encode_rows_(x: Tensor, codes: Tensor, scales: Tensor, bits: int, draws: Draws | None = None) -> None:
    """Rounds x (S, R, C), of any floating dtype, into `codes` (S, R, code_bytes) uint8 and `scales` (S, R, J), in `wide_dtype` of
    x's. Rows are contiguous within each slice. `draws`: of the random bits; None: to nearest. Communicates nothing."""
    if x.dtype != torch.float64 and use_triton(x.device):
        from rowwise.kernels.row_codes_triton import encode_triton_

        encode_triton_(x, codes, scales, bits, draws)
    else:
        encode_reference_(x, codes, scales, bits, draws)


def decode_rows_(codes: Tensor, scales: Tensor, out: Tensor, bits: int, add: bool = False) -> None:
    """Writes x^ into `out` (S, R, C), rounded to its dtype; `add`: adds it to what is there. Communicates nothing."""
    if out.dtype != torch.float64 and use_triton(out.device):
        from rowwise.kernels.row_codes_triton import decode_triton_

        decode_triton_(codes, scales, out, bits, add)
    else:
        decode_reference_(codes, scales, out, bits, add)


def rounded_rows(x: Tensor) -> Tensor:
    """Gives x^ of x (R, C) in 8 bits, rounded to nearest, in x's dtype: what ranks that gather x compute with."""
    rows, columns = x.shape
    codes = torch.empty(1, rows, code_bytes(columns, 8), dtype=torch.uint8, device=x.device)
    scales = torch.empty(1, rows, blocks_of(columns), dtype=wide_dtype(x.dtype), device=x.device)
    encode_rows_(x[None], codes, scales, 8)
    out = torch.empty_like(x)
    decode_rows_(codes, scales, out[None], 8)
    return out


def encode_reference_(x: Tensor, codes: Tensor, scales: Tensor, bits: int, draws: Draws | None = None) -> None:
    """Computes `encode_rows_` in plain torch."""
    slices, rows, columns = x.shape
    largest = (1 << (bits - 1)) - 1
    for s in range(slices):
        for part in row_portions(rows, columns):
            x_RJW = _in_blocks(x[s, part].to(scales.dtype))
            scale = x_RJW.abs().amax(2) / largest
            scale = scale.where(scale.isfinite(), torch.nan).where(~(scale < LEAST), 0.0)
            scales[s, part] = scale
            usable = (scale > 0)[:, :, None]
            y = (x_RJW / scale[:, :, None]).where(usable, 0.0).flatten(1)[:, :columns]
            if draws is not None:
                first = draws.start + (s * rows + part.start) * columns
                y = _rounded_at_random(y, random_16(draws.key, first, y.numel(), y.device).view_as(y))
            y = y.round().clamp_(-largest, largest)
            codes[s, part] = _packed((y + (largest + 1)).to(torch.uint8), bits)


def decode_reference_(codes: Tensor, scales: Tensor, out: Tensor, bits: int, add: bool = False) -> None:
    """Computes `decode_rows_` in plain torch."""
    slices, rows, columns = out.shape
    for s in range(slices):
        for part in row_portions(rows, columns):
            numbers = _unpacked(codes[s, part], bits)[:, :columns].to(scales.dtype) - (1 << (bits - 1))
            numbers = (_in_blocks(numbers) * scales[s, part, :, None]).flatten(1)[:, :columns]
            out[s, part] = out[s, part] + numbers if add else numbers


def _rounded_at_random(y: Tensor, random: Tensor) -> Tensor:
    below = y.floor()
    return below + ((y - below) * 65536 > random + 0.5)


def _in_blocks(x_RC: Tensor) -> Tensor:
    """(R, J, W), the last block filled up with zeros, which change no scale."""
    missing = -x_RC.size(1) % WIDTH
    filled = torch.nn.functional.pad(x_RC, (0, missing)) if missing else x_RC
    return filled.unflatten(1, (-1, WIDTH))


def _packed(numbers: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return numbers
    even = torch.nn.functional.pad(numbers, (0, numbers.size(1) % 2), value=8)
    return even[:, ::2] | even[:, 1::2] << 4


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
