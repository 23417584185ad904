"""Where a check of gpu.py runs, and what it may need there."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# From this version on, several ranks may share a GPU where NCCL_MULTI_RANK_GPU_ENABLE=1.
NCCL_SHARES_A_GPU = (2, 30)


class NotPossibleHere(Exception):
    """A check needs what this machine lacks; the message says what."""


@dataclass(frozen=True)
class Place:
    """`rehearsal`: on the CPU, at sizes of which nothing is learnt but that the check itself runs."""

    rehearsal: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def ranks(self) -> int:
        """As many as layouts are tried on: two wherever NCCL takes two."""
        if self.rehearsal or torch.cuda.device_count() > 1:
            return 2
        return 2 if torch.cuda.nccl.version()[:2] >= NCCL_SHARES_A_GPU else 1

    def two_ranks(self) -> int:
        """2; raises NotPossibleHere where there is one GPU for them and NCCL does not share it."""
        if self.ranks < 2:
            version = ".".join(map(str, torch.cuda.nccl.version()))
            raise NotPossibleHere(f"two GPUs are needed (NCCL {version}; from 2.30 on two ranks may share one)")
        return self.ranks

    def wait(self) -> None:
        """Until the device has done all that it was asked."""
        if not self.rehearsal:
            torch.cuda.synchronize()


def make_importable() -> None:
    """Makes `rowwise` and the tests' helpers importable here and in processes that are started from here, also where
    nothing was installed."""
    paths = [str(ROOT / name) for name in ("tests", "benchmarks", "src")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def facts() -> dict[str, Any]:
    """Of the GPUs: what code is compiled for, the driver, the libraries that torch brings."""
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,clocks.max.sm,power.limit", "--format=csv"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    return {
        "sm": ["{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": said.splitlines(),
    }
