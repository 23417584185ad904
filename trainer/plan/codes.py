"""What it takes to code and to decode on a CPU, where that is done in portions in many operators; a GPU's kernel takes nothing beside
what it gives. Found by doing it on the meta device, where nothing takes memory."""

import functools
from collections.abc import Sequence

import torch

from rowwise.kernels.activation_codes import Codes, channel_groups, decode_reference_, encode
from rowwise.kernels.portions import portion_elements
from rowwise.kernels.row_codes import Draws, blocks_of, code_bytes, encode_reference_
from rowwise.kernels.row_codes import decode_reference_ as decode_rows_reference_
from rowwise.parallel.lifetimes import Lifetimes


def coding_bytes(columns: int, tokens: int) -> tuple[int, int]:
    """(to code, to decode): counts the bytes at most beside a result of so many numbers a token and its codes."""
    return _bytes(_rows(tokens, columns), columns, portion_elements())


def _rows(tokens: int, columns: int) -> int:
    """Of a portion: all are alike."""
    return min(tokens, max(1, portion_elements() // columns))


def message_bytes(shapes: Sequence[torch.Size], bits: int) -> tuple[int, int]:
    """(to code at random, to decode and add): counts the bytes at most beside gradients of these shapes and their codes."""
    sizes = [
        _codes(_rows(shape[0], shape[1]), shape[1], bits, portion_elements()) for shape in shapes if len(shape) == 2
    ]
    return max((size[0] for size in sizes), default=0), max((size[1] for size in sizes), default=0)


@functools.cache
def _codes(rows: int, columns: int, bits: int, portion: int) -> tuple[int, int]:
    x = torch.empty(1, rows, columns, device="meta")
    codes = x.new_empty(1, rows, code_bytes(columns, bits), dtype=torch.uint8)
    scales = x.new_empty(1, rows, blocks_of(columns))
    with torch.no_grad(), Lifetimes([], []) as coding:
        encode_reference_(x, codes, scales, bits, Draws(0, 0))
    with torch.no_grad(), Lifetimes([], []) as decoding:
        decode_rows_reference_(codes, scales, x, bits, add=True)
    return coding.peaks()[1], decoding.peaks()[1]


@functools.cache
def _bytes(rows: int, columns: int, portion: int) -> tuple[int, int]:
    """(coding, decoding) of a portion."""
    x = torch.empty(rows, columns, device="meta")
    tokens, groups = torch.empty(rows, dtype=torch.int64, device="meta"), channel_groups(columns)
    with Lifetimes([], []) as lives:
        made = encode(x, groups, 0, tokens)
    coding = lives.peaks()[1] - sum(t.nbytes for t in made)
    with Lifetimes([], []) as lives:
        decode_reference_(Codes(*made), groups.width, x)
    return coding, lives.peaks()[1]
