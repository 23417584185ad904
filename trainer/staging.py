"""A copy of a run's state in host memory, for the thread that writes it while training goes on.

Bytes a rank: those of its rows of parameters, states and masks, each copied once. On a GPU the copy lies in one pinned
block, made by the first save and kept: the device fills it by itself, behind the work that it was given before and ahead of
what comes. The CPU's is training's own memory, so there it is given back after each save. What lies in files is copied to files
beside them, which are freed after each save, and takes no memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rowwise.kernels.rows import local
from rowwise.kernels.torch_dtensor import laid_out_as
from rowwise.parallel.device import Device, Mark
from rowwise.parallel.row_file import RowFile

ALIGNED = 64  # bytes, enough for every dtype and for a copy to be fast
Layout = Mapping[str, tuple[torch.Size, torch.dtype]]


class Staging:
    """The copies of one run, some of whose rows lie in `files`. Those of one save stand until the next asks for its own."""

    def __init__(self, device: Device, files: Sequence[RowFile] = ()):
        self._device, self._files = device, files
        self._layout: Layout = {}
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mark]:
        """Returns a copy of each on the host, split as it is, and when they are there. What is asked of the current stream later
        may change the tensors. Raises OSError where a file's disk has no room for its copy."""
        rows = {name: local(t) for name, t in tensors.items()}
        copies = self._filed(rows)
        rooms = self._rooms({name: (t.shape, t.dtype) for name, t in rows.items() if name not in copies})
        for name, room in rooms.items():
            room.copy_(rows[name], non_blocking=self._device.pins)
        copies |= rooms
        return {name: _split_as(tensor, copies[name]) for name, tensor in tensors.items()}, self._device.mark()

    def _filed(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of what lies in files."""
        copies: dict[str, Tensor] = {}
        for file in self._files:
            there = {name: t for name, t in rows.items() if file.holds(t)}
            copies |= zip(there, file.snapshot(list(there.values())), strict=True)
        return copies

    def _rooms(self, layout: Layout) -> dict[str, Tensor]:
        if not self._device.pins:
            return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        if layout != self._layout:
            self._kept = {}  # the old block is free before the new one is made
            block, self._kept = in_one_block(layout)
            self._device.pin(block)
            self._layout = layout
        return self._kept


def in_one_block(layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns a block of bytes and the tensors in it, which keep it. Each has a storage of its own size: torch's writer would copy a
    tensor whose storage is larger."""
    places, end = {}, 0
    for name, (shape, dtype) in layout.items():
        places[name] = end
        end += -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED
    block = torch.empty(end, dtype=torch.uint8)
    memory: Any = block.numpy()
    return block, {
        name: torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=places[name]).view(shape)
        if shape.numel()
        else torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in layout.items()
    }


def _split_as(tensor: Tensor, rows: Tensor) -> Tensor:
    """`rows` as this rank's of a tensor that is split like `tensor`. (`DTensor.from_local` would move them to its device.)"""
    return laid_out_as(tensor, rows) if isinstance(tensor, DTensor) else rows
