"""Rows of parameters as messages of bytes: matrices as codes with their scales (`kernels.row_codes`), vectors as they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowwise.kernels.row_codes import Draws, blocks_of, code_bytes, decode_rows_, encode_rows_
from rowwise.kernels.wide import wide_dtype

ALIGNED = 16  # bytes, that every part of a message begins at a whole number of its own


@dataclass(frozen=True)
class _Matrix:
    """Where a matrix (rows, columns) begins among the numbers, and its scales and codes among the bytes."""

    rows: int
    columns: int
    number: int
    scales: int
    codes: int


class RowMessages:
    """The form of messages that hold `shapes`, one after the other: what a rank has of some parameters, in `dtype`. S slices are
    (S, numbers) as numbers and (S, bytes) as messages; a matrix takes `bits` a number and a scale for every 256 of a row."""

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, bits: int):
        self.dtype, self.bits, self._scale_dtype = dtype, bits, wide_dtype(dtype)
        self.numbers, self.bytes = sum(shape.numel() for shape in shapes), 0
        starts = [sum(shape.numel() for shape in shapes[:i]) for i in range(len(shapes))]
        placed = list(zip(shapes, starts, strict=True))
        # number, byte, how many
        self._vectors = [
            (start, self._take(shape.numel(), dtype), shape.numel()) for shape, start in placed if len(shape) != 2
        ]
        self._matrices = [
            _Matrix(
                *shape,
                start,
                self._take(shape[0] * blocks_of(shape[1]), self._scale_dtype),
                self._take(shape[0] * code_bytes(shape[1], bits), torch.uint8),
            )
            for shape, start in placed
            if len(shape) == 2
        ]

    def pack_(self, flat: Tensor, messages: Tensor, key: int | None = None, first: int = 0) -> None:
        """Makes messages (S, bytes) of flat (S, numbers). `key`: of the random bits that round codes, from element `first` of their
        stream on; None: to nearest."""
        for start, byte, count in self._vectors:
            self._view(messages, byte, count, self.dtype).copy_(flat[:, start : start + count])
        for matrix in self._matrices:
            draws = None if key is None else Draws(key, first + matrix.number * flat.size(0))
            encode_rows_(_rows(flat, matrix), *self._codes(messages, matrix), self.bits, draws)

    def unpack_(self, messages: Tensor, flat: Tensor, add: bool = False) -> None:
        """Writes into flat (S, numbers), of any floating dtype, what messages (S, bytes) hold; `add`: adds it."""
        for start, byte, count in self._vectors:
            there, here = flat[:, start : start + count], self._view(messages, byte, count, self.dtype)
            there.add_(here) if add else there.copy_(here)
        for matrix in self._matrices:
            decode_rows_(*self._codes(messages, matrix), _rows(flat, matrix), self.bits, add)

    def _take(self, count: int, dtype: torch.dtype) -> int:
        """Gives the byte at which room for so many numbers begins."""
        start = self.bytes
        self.bytes += math.ceil(count * dtype.itemsize / ALIGNED) * ALIGNED
        return start

    def _codes(self, messages: Tensor, matrix: _Matrix) -> tuple[Tensor, Tensor]:
        """The codes (S, rows, bytes of a row) and scales (S, rows, blocks) of a matrix."""
        width, blocks = code_bytes(matrix.columns, self.bits), blocks_of(matrix.columns)
        codes = self._view(messages, matrix.codes, matrix.rows * width, torch.uint8)
        scales = self._view(messages, matrix.scales, matrix.rows * blocks, self._scale_dtype)
        return codes.unflatten(1, (matrix.rows, width)), scales.unflatten(1, (matrix.rows, blocks))

    @staticmethod
    def _view(messages: Tensor, byte: int, count: int, dtype: torch.dtype) -> Tensor:
        return messages[:, byte : byte + count * dtype.itemsize].view(dtype)


def _rows(flat: Tensor, matrix: _Matrix) -> Tensor:
    numbers = flat[:, matrix.number : matrix.number + matrix.rows * matrix.columns]
    return numbers.unflatten(1, (matrix.rows, matrix.columns))
