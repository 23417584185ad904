"""What this machine does, timed: products, copies, messages between ranks, the optimizer's step on the host, disks.

Each figure is of the fastest of ROUNDS, since whatever else runs here only slows them; of a disk, whose rounds differ little, of all
that is written.
"""

import contextlib
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from rowwise.optim.adamw import AdamWConfig
from rowwise.optim.build import new_rule
from rowwise.optim.quantized import AdamW8bitConfig
from rowwise.optim.rule import Batch
from rowwise.parallel.device import device_of
from rowwise.parallel.torch_c10d import all_gather_flat, default_group
from rowwise.trainer.offloading import product_speed

ROUNDS = 4
STEPPED = 16 << 20  # numbers, in rows of ROW
ROW = 4096
MOVED = 256 << 20  # bytes that are copied, and gathered
BLOCK = 8 << 20  # bytes that a disk is given at once
FILES = 4  # that it is given at the same time
LONGEST = 30.0  # seconds that are written, of a slow disk
RULES: dict[str, AdamWConfig | AdamW8bitConfig] = {"step": AdamWConfig(), "step_8bit": AdamW8bitConfig()}


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second that a disk was written and read with. `direct`: past the system's own cache, which else may have hidden some."""

    write: float
    read: float
    direct: bool


def fastest(once: Callable[[], object], device: torch.device) -> float:
    """Gives the seconds of the fastest of ROUNDS, after one that is not counted."""
    does, seconds = device_of(device), list[float]()
    for _ in range(ROUNDS + 1):
        does.mark().synchronize()
        began = time.perf_counter()
        once()
        does.mark().synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def compute_figures(device: torch.device) -> dict[str, float]:
    """Measures products a second (of a GPU in 16 bits, and how much slower they are in 32), and the bandwidth of the memory; of a CPU
    those of a core."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            flops = max(product_speed(device, torch.float32) for _ in range(ROUNDS))
            return {"flops": flops, "wide": 1.0, "bandwidth": memory_speed(device)}
        finally:
            torch.set_num_threads(threads)
    flops, wide = (
        max(product_speed(device, dtype) for _ in range(ROUNDS)) for dtype in (torch.bfloat16, torch.float32)
    )
    return {"flops": flops, "wide": flops / wide, "bandwidth": memory_speed(device), "host": copy_speed(device)}


def memory_speed(device: torch.device) -> float:
    """Measures the bytes a second that a copy reads and writes in the memory of a device."""
    t, to = (torch.zeros(MOVED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * MOVED / fastest(lambda: to.copy_(t), device)


def copy_speed(device: torch.device) -> float:
    """Measures the bytes a second between a GPU and pinned memory of the host, of the slower direction."""
    here = torch.zeros(MOVED, dtype=torch.uint8, pin_memory=True)
    there = here.to(device)
    back = fastest(lambda: there.copy_(here, non_blocking=True), device)
    away = fastest(lambda: here.copy_(there, non_blocking=True), device)
    return MOVED / max(back, away)


def gather_speed(device: torch.device) -> float:
    """Measures the bytes a second that a rank takes in of an all-gather of MOVED bytes, of the slowest rank. Over all ranks."""
    ranks = dist.get_world_size()
    mine = torch.zeros(MOVED // ranks, dtype=torch.uint8, device=device)
    whole = torch.empty(mine.numel() * ranks, dtype=torch.uint8, device=device)
    seconds = torch.tensor(fastest(lambda: all_gather_flat(whole, mine, default_group()), device), device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return mine.numel() * (ranks - 1) / seconds.item()


def step_speed(figure: str) -> float:
    """Measures the numbers a second that all cores step, by the rule of that figure, of parameters, gradients and states in the host's
    memory."""
    config = RULES[figure]
    rule, shape = new_rule(config.name, config), torch.Size((STEPPED // ROW, ROW))
    p, gradient = torch.full(shape, 0.5), torch.full(shape, 1e-3)
    batch = Batch(["w"], [p], [gradient], [rule.new_state(p)], [shape], [0], None, 1, 1e-4, 0.1, 0)
    with torch.no_grad():
        return STEPPED / fastest(lambda: rule.step_(batch), p.device)


def disk_speed(folder: Path, size: int) -> DiskSpeed:
    """Measures how fast FILES files of `size` bytes in all are written, to the disk itself, and read again; they have no name, and
    are gone when this process is, whatever ends it. Raises OSError where they cannot be written."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(FILES) as threads:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0)) for _ in range(FILES)]
        direct = all(_direct(file) for file in files)  # or none is
        blocks, until = -(-size // FILES // BLOCK), time.perf_counter() + LONGEST
        began = time.perf_counter()
        written = sum(threads.map(lambda file: _write(file, blocks, until), files))
        seconds = time.perf_counter() - began
        for file in files:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        read = sum(threads.map(_read, files))
        assert read == written
        return DiskSpeed(written / seconds, read / (time.perf_counter() - began), direct)


def _direct(file: BinaryIO) -> bool:
    """Has a file go round the system's cache, and says whether its file system can."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
        return True
    return False


def _write(file: BinaryIO, blocks: int, until: float) -> int:
    """Writes blocks of which none can be made smaller, until a moment has come, and to the disk. Returns the bytes."""
    with mmap.mmap(-1, BLOCK) as block:  # whole pages, as what goes round the cache must be
        block[:] = os.urandom(BLOCK)
        written = 0
        while written < blocks * BLOCK and (not written or time.perf_counter() < until):
            written += os.pwrite(file.fileno(), block, written)
        os.fsync(file.fileno())
    return written


def _read(file: BinaryIO) -> int:
    with mmap.mmap(-1, BLOCK) as block:
        read = 0
        while some := os.preadv(file.fileno(), [block], read):
            read += some
    return read
