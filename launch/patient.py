"""What `rowwise doctor` has forks do, which have torch and may touch devices."""

import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

from rowwise.launch.forked import Telling

BYTES = 4 << 20
ROUNDS = 5


def tell_devices(tell: Telling) -> None:
    """Tells what torch is, what it was built for, and which GPUs it sees."""
    cuda = torch.version.cuda or torch.version.hip
    libraries = []
    if dist.is_nccl_available():
        libraries.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    if torch.backends.cudnn.is_available():
        libraries.append(f"cuDNN {torch.backends.cudnn.version()}")
    libraries.append("gloo" if dist.is_gloo_available() else "no gloo")
    count = torch.cuda.device_count()
    tell({"torch": torch.__version__, "cuda": cuda, "libraries": libraries, "gpus": [_gpu(n) for n in range(count)]})


def _gpu(number: int) -> str:
    device = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return (
        f"{number}: {device.name}, sm_{device.major}{device.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, "
        f"{device.multi_processor_count} processors"
    )


def exchange(tell: Telling, rank: int, backend: str, store: str) -> None:
    """Adds up BYTES with another rank; rank 0 tells the seconds of the fastest of ROUNDS."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group(backend, store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timeout)
    numbers, seconds = torch.ones(BYTES // 4, device=device), list[float]()
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        seconds.append(time.perf_counter() - began)
    if numbers[0].item() != 2.0**ROUNDS:
        raise RuntimeError(f"the sum is {numbers[0].item()}, and not {2.0**ROUNDS}")
    told: dict[str, Any] = {"seconds": min(seconds), "bytes": BYTES}
    if rank == 0:
        tell(told)
    dist.destroy_process_group()
