"""Whether what a run keeps off its device has room there, and how much of what layers keep can wait there: measured on every machine,
before the first step.

What layers keep of a micro-batch leaves as the forward goes, and is to be gone when that is. Beside it so many bytes go as

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
from dataclasses import dataclass
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
from rowwise.trainer.plan.states import optimizer_bytes, parameter_bytes, place_of

PROBE_BYTES = 32 << 20  # what is moved to find out how fast that goes
_measured: dict[str, float] = {}  # bytes a second into a folder, as this process found when it last checked it


class FolderUnfit(ValueError):
    """A folder of `memory` that a machine does not have, or that is too small or too slow there. The message is one line."""


@dataclass(frozen=True)
class Kept:
    """What waits in the folder that `option` gives: the bytes of a rank, what they are, and what makes them less. `copied`: a save in
    the background has another copy of them there."""

    option: str
    where: str
    size: int
    name: str
    less: str
    copied: bool = False

    @property
    def given(self) -> str:
        return f"{self.option}={self.where}"

    @property
    def folder(self) -> Path:
        return Path(self.where).expanduser()

    @property
    def room(self) -> int:
        return self.size * (1 + self.copied)


def kept_in_folders(config: TrainConfig) -> list[Kept]:
    """Lists what waits in folders."""
    memory, kept = config.memory, list[Kept]()
    if is_folder(memory.offload_activations):
        less = "a smaller batch.micro_size, memory.compress=int8 or memory.recompute"
        size = micro_batch_bytes(config)
        kept.append(Kept("memory.offload_activations", memory.offload_activations, size, "a micro-batch", less))
    fewer, copied = "more workers with parallel.zero=1 to 3", config.checkpoint.background
    for key, size, name, saved in (
        ("offload_states", state_bytes_of(config), "optimizer states", copied),
        ("offload_params", row_bytes_of(config), "parameters", copied),
        ("offload_gradients", row_bytes_of(config), "gradients", False),
    ):
        if is_folder(where := getattr(memory, key)):
            less = f"{fewer}, or checkpoint.background=false" if saved else fewer
            kept.append(Kept(f"memory.{key}", where, size, name, less, saved))
    return kept


def state_bytes_of(config: TrainConfig) -> int:
    """Counts the optimizer states of a rank, of a pipeline that of all its ranks' mean."""
    return optimizer_bytes(config, range(config.model.layers), place_of(0, config.parallel)) // config.parallel.pipeline


def row_bytes_of(config: TrainConfig) -> int:
    """Counts a rank's rows of parameters, of a pipeline that of all its ranks' mean."""
    place = place_of(0, config.parallel)
    return parameter_bytes(config, range(config.model.layers), place, held_by_fsdp=True) // config.parallel.pipeline


def check_folder(config: TrainConfig, ranks: int = 1) -> None:
    """Refuses a folder of `memory` that is none, that cannot be written, that has less room than `ranks` of this machine need, or that
    is so slow that other ranks would give up waiting: measured, on this machine. Raises ValueError."""
    taken: dict[int, int] = {}  # by the disk
    every, probed = kept_in_folders(config), set[str]()
    for kept in every:
        if not kept.where or not kept.folder.is_dir():
            raise ValueError(
                f"{kept.given}: there is no such folder; possible are none, cpu, or the path of a folder, which you make"
            )
        disk, free = kept.folder.stat().st_dev, shutil.disk_usage(kept.folder).free
        needed = taken[disk] = taken.get(disk, 0) + kept.room * ranks
        if needed > free:
            who = "a rank keeps" if ranks == 1 else f"{ranks} ranks of this machine keep"
            also = " and the copy of a save in the background" * kept.copied
            raise ValueError(
                f"{kept.given}: {who} {needed / 1e9:,.1f} GB of {kept.name}{also} there, and it has {free / 1e9:,.1f} GB free; give "
                f"another folder, {kept.less}"
            )
        if kept.where not in probed:  # once, of all that waits there
            probed.add(kept.where)
            _probe(kept, max(one.size for one in every if one.where == kept.where))
        _require_fast(config, kept)


def _probe(kept: Kept, most: int) -> None:
    try:
        _measured[kept.where] = write_speed(kept.folder, min(PROBE_BYTES, most or PROBE_BYTES))
    except OSError as error:
        raise ValueError(f"{kept.given} cannot be written ({error.strerror}); give another folder") from None


def _require_fast(config: TrainConfig, kept: Kept) -> None:
    speed = _measured[kept.where]
    if (seconds := kept.size / speed) > config.parallel.timeout_seconds:
        raise ValueError(
            f"{kept.given}: {kept.size / 1e9:,.1f} GB of {kept.name} take {seconds:,.0f} s to be written there, at "
            f"{speed / 1e6:,.1f} MB/s, and ranks wait parallel.timeout_seconds={config.parallel.timeout_seconds} for each "
            f"other; give a faster folder, or {kept.less}"
        )


def require_folder(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses a folder of `memory` that some machine does not have, or that is too small or too slow there, on every rank: each tries
    its own. Raises FolderUnfit. Two messages of a line a rank over `mesh.save_group`."""
    if not kept_in_folders(config):
        return
    mine, nodes = None, from_every_rank(platform.node(), mesh.save_group)
    try:
        check_folder(config, nodes.count(platform.node()))
    except ValueError as error:
        mine = str(error)
    for rank, (node, complaint) in enumerate(zip(nodes, from_every_rank(mine, mesh.save_group), strict=True)):
        if complaint is not None:
            raise FolderUnfit(f"rank {rank} ({node}): {complaint}")


def folder_speed(config: TrainConfig, where: str) -> float:
    """Tells the bytes a second that reach a folder of `memory`, as `check_folder` measured them in this process, or measures them."""
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
