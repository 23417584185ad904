"""What `rowwise measure` has forks do, which have torch and may touch devices."""

import datetime
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from rowwise.launch.forked import Telling
from rowwise.parallel.mesh import pick_device
from rowwise.trainer.machine import RULES, compute_figures, disk_speed, gather_speed, step_speed
from rowwise.trainer.plan.require import untimed_device


def tell_known(tell: Telling) -> None:
    """Tells how many GPUs there are, and the figures that are known of what this machine computes on."""
    tell({"gpus": torch.cuda.device_count(), "known": vars(untimed_device(pick_device(0)))})


def tell_alone(tell: Telling, folder: str | None, size: int) -> None:
    """Tells what a single process measures: of the device, of the host's step, and of the disk of a folder."""
    found = compute_figures(pick_device(0)) | {figure: step_speed(figure) for figure in RULES}
    if folder is not None:
        disk = disk_speed(Path(folder), size)
        found |= {"disk": disk.write, "disk_read": disk.read, "direct": disk.direct}
    tell(found | {"threads": torch.get_num_threads()})


def gather(tell: Telling, rank: int, ranks: int, store: str) -> None:
    """Gathers over all ranks of this machine; rank 0 tells the bytes a second."""
    device, patience = pick_device(rank), datetime.timedelta(seconds=60)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of a name that torch has changed since 2.11
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=patience)
    speed = gather_speed(device)
    if rank == 0:
        tell({"link": speed})
    dist.destroy_process_group()
