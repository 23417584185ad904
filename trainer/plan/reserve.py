"""What a device needs beside what a run's own operations hold, and whether all of it fits."""

import math
from dataclasses import dataclass

from rowwise.trainer.plan.devices import GIBI, Device
from rowwise.trainer.plan.memory import Memory

LIBRARIES = 1.25 * GIBI  # a CUDA context, buffers of NCCL, workspaces of cuBLAS
FRAGMENTATION = 0.03  # of what is held at most: blocks of an allocator that nothing fits into
HOST = 0.15  # of a machine's memory: its system, what reads the data and writes checkpoints, and the workers themselves


@dataclass(frozen=True)
class Room:
    """Bytes: what a rank holds at most, what is reserved beside it, and what there is; what waits on the `host`, and how much of a
    rank's part of that may; what waits in `files`, and how much there is room for."""

    held: int
    reserve: int
    limit: float
    host: int = 0
    ram: float = math.inf
    files: int = 0
    disk: float = math.inf

    @property
    def needed(self) -> int:
        return self.held + self.reserve

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit and self.host <= self.ram and self.files <= self.disk


def room_of(memory: Memory, device: Device, limit: float | None = None) -> Room:
    """Gives the room of the rank on a device; `limit`: of which it may take so much."""
    reserve = (LIBRARIES if device.cuda else 0) + FRAGMENTATION * memory.most
    there = device.memory if limit is None else min(limit, device.memory)
    if not device.cuda:  # whose memory is the host's
        return Room(memory.most + memory.host, int(reserve), there, files=memory.files, disk=device.disk_room)
    return Room(memory.most, int(reserve), there, memory.host, (1 - HOST) * device.ram, memory.files, device.disk_room)
