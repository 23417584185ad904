"""Masks of single weights, eight to a byte along the row: bit j mod 8 of byte j div 8 is column j. Rows are split as the
weight's are; 1/8 byte a weight, in memory and in checkpoints."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rowwise.kernels.portions import device_portions


def packed_columns(columns: int) -> int:
    """Counts the bytes of a packed row."""
    return -(-columns // 8)


def pack(mask: Tensor) -> Tensor:
    """Packs bool (r, n) to uint8 (r, ceil(n / 8)); what is left of the last byte is zero."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, packed_columns(columns) * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :columns] = mask
    return (padded.view(rows, -1, 8) << _bits(mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Unpacks to bool (r, n)."""
    bits = (packed[:, :, None] >> _bits(packed.device)) & 1
    return bits.flatten(1)[:, :columns].bool()


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def portions(packed: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, their mask as bool), a portion of rows at a time."""
    for rows in device_portions(packed, columns):
        yield rows, unpack(packed[rows], columns)


def join(masks: list[Tensor], columns: int, device: torch.device) -> Tensor:
    """Joins the packed masks of successive rows in one; there may be none, where a rank has no rows."""
    return torch.cat(masks) if masks else torch.zeros(0, packed_columns(columns), dtype=torch.uint8, device=device)


def count(packed: Tensor, columns: int) -> Tensor:
    """Counts how many bits are set, a number on the device."""
    total = torch.zeros((), dtype=torch.int64, device=packed.device)
    for _, mask in portions(packed, columns):
        total += mask.sum()
    return total


def fill_(packed: Tensor, columns: int) -> None:
    """Sets every bit."""
    packed.copy_(pack(torch.ones(1, columns, dtype=torch.bool, device=packed.device)).expand_as(packed))


def zero_outside_(x: Tensor, packed: Tensor) -> None:
    """Sets x (r, n) to 0 where the mask is not set, in place; what is there counts for nothing, not even a NaN."""
    for rows, mask in portions(packed, x.size(1)):
        x[rows].masked_fill_(~mask, 0)
