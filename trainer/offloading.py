"""Whether what layers keep can wait off the device, and how much of it: measured on every machine, before the first step.

What leaves is to be gone when the forward is, which takes it away as it goes. Of a micro-batch so many bytes go beside it as

    B F / P        B: bytes a second that leave; F: operations of a rank's forward; P: operations a second

(Liao et al., *Fuyou*, which measures a first step). B is of writing a folder through to its device, or of copying to the host; P of
a product, so that the forward takes somewhat longer than F / P, and rather less is sent than could be. All ranks measure at once,
as they send at once, and the slowest counts for all.
"""

import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rowwise.parallel.activations.config import is_folder
from rowwise.parallel.device import device_of
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.parallel.precision import compute_dtype
from rowwise.trainer.activations import micro_batch_bytes, tokens_of
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.decoder import layer_flops

PROBE_BYTES = 32 << 20  # what is moved to find out how fast that goes
_measured: dict[str, float] = {}  # bytes a second into a folder, as this process found when it last checked it


class FolderUnfit(ValueError):
    """A folder for activations that a machine does not have, or that is too small or too slow there. The message is one line."""


def check_folder(config: TrainConfig) -> None:
    """Refuses a folder for activations that is none, that cannot be written, that has less room than a rank needs, or that is so
    slow that other ranks would give up waiting: measured, on this machine. Raises ValueError."""
    where = config.memory.offload_activations
    if where in ("none", "cpu"):
        return
    given, folder = f"memory.offload_activations={where}", Path(where).expanduser()
    if not where or not folder.is_dir():
        raise ValueError(
            f"{given}: there is no such folder; possible are none, cpu, or the path of a folder, which you make"
        )
    needed, free = micro_batch_bytes(config), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{given}: a rank keeps {needed / 1e9:,.1f} GB of a micro-batch there, and it has {free / 1e9:,.1f} GB free; give "
            "another folder, a smaller batch.micro_size, memory.compress=int8 or memory.recompute"
        )
    try:
        _measured[where] = write_speed(folder, min(PROBE_BYTES, needed or PROBE_BYTES))
    except OSError as error:
        raise ValueError(f"{given} cannot be written ({error.strerror}); give another folder") from None
    if (seconds := needed / _measured[where]) > config.parallel.timeout_seconds:
        raise ValueError(
            f"{given}: {needed / 1e9:,.1f} GB of a micro-batch take {seconds:,.0f} s to be written there, at "
            f"{needed / seconds / 1e6:,.1f} MB/s, and ranks wait parallel.timeout_seconds={config.parallel.timeout_seconds} for each "
            "other; give a faster folder, or a smaller batch.micro_size"
        )


def check_row_folders(config: TrainConfig) -> None:
    """Refuses a folder for rows that this machine does not have. Their room is taken once they lie there. Raises ValueError."""
    for key in ("offload_states", "offload_params", "offload_gradients"):
        where = getattr(config.memory, key)
        if is_folder(where) and not (where and Path(where).expanduser().is_dir()):
            raise ValueError(
                f"memory.{key}={where}: there is no such folder; possible are none, cpu, or the path of a folder, which you make"
            )


def require_folder(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses a folder for activations that some machine does not have, or that is too small or too slow there, on every rank: each
    tries its own. Raises FolderUnfit. One message of a line a rank over `mesh.save_group`."""
    if config.memory.offload_activations in ("none", "cpu"):
        return
    try:
        check_folder(config)
        mine = None
    except ValueError as error:
        mine = str(error)
    for rank, (node, complaint) in enumerate(from_every_rank((platform.node(), mine), mesh.save_group)):
        if complaint is not None:
            raise FolderUnfit(f"rank {rank} ({node}): {complaint}")


def folder_speed(config: TrainConfig) -> float:
    """Tells the bytes a second that reach the folder for activations, as `check_folder` measured them in this process, or measures
    them."""
    where = config.memory.offload_activations
    if where not in _measured:
        check_folder(config)
    return _measured[where]


def leaving_share(config: TrainConfig, mesh: Mesh) -> float:
    """Says which share of what layers keep leaves the device: that which is configured, or what the bandwidth carries beside the
    forward, the same on all ranks. For `auto`, one all-reduce of two float64 over all ranks."""
    memory = config.memory
    if memory.offload_activations == "none" or memory.offload_share == "all":
        return 1.0
    if memory.offload_share != "auto":
        return memory.offload_share
    size = min(PROBE_BYTES, micro_batch_bytes(config) or PROBE_BYTES)
    speeds = (
        leaving_speed(memory.offload_activations, size, mesh.device),
        product_speed(mesh.device, compute_dtype(config.precision)),
    )
    slowest = torch.tensor(speeds, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(slowest, dist.ReduceOp.MIN)
    return carried_share(config, *slowest.tolist())


def carried_share(config: TrainConfig, bytes_a_second: float, operations_a_second: float) -> float:
    """Says which share of what a rank's layers keep of a micro-batch goes away beside their forward."""
    operations = tokens_of(config) * config.model.layers * layer_flops(config.model, config.batch.seq_len)[1]
    room = bytes_a_second * operations / config.parallel.pipeline / operations_a_second
    return min(1.0, room / micro_batch_bytes(config))


def leaving_speed(where: str, size: int, device: torch.device) -> float:
    """Measures the bytes a second that leave `device` for the host, or reach a folder's device."""
    if where != "cpu":
        return write_speed(Path(where).expanduser(), size)
    copies, t = device_of(device).copies(), torch.zeros(size, dtype=torch.uint8, device=device)
    copies.away(t)[1].synchronize()  # the first allocates
    started = time.perf_counter()
    copies.away(t)[1].synchronize()
    return size / (time.perf_counter() - started)


def write_speed(folder: Path, size: int) -> float:
    """Measures the bytes a second that reach a folder's device. Raises OSError where it cannot be written."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        file.write(bytes(size))
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations a second of a product in `dtype`, 2 a multiplication."""
    n, times = (4096, 10) if device.type == "cuda" else (512, 2)
    a, does = torch.full((n, n), 0.5, dtype=dtype, device=device), device_of(device)
    torch.mm(a, a)
    does.mark().synchronize()
    started = time.perf_counter()
    for _ in range(times):
        torch.mm(a, a)
    does.mark().synchronize()
    return 2 * n**3 * times / (time.perf_counter() - started)
