"""What DeepSpeed compiles on a machine when it is first used: whether it can be, and whether it is under way.

Its kernels for processors and for files are sources, compiled with the machine's own compiler and kept for later starts. A compiler
that was killed leaves a lock behind, for which every later start would wait without a word.
"""

import ctypes.util
import os
import shutil
import sys
from pathlib import Path

import psutil
import torch
from torch.utils.cpp_extension import get_default_build_root

from rowwise.parallel.accelerate.config import by_deepspeed
from rowwise.trainer.config import TrainConfig

ON_HOST, FILES = "cpu_adam", ("pin_memory", "async_io")
MINUTES = {ON_HOST: 2, "pin_memory": 0.5, "async_io": 5}  # on two cores


def check_builds(config: TrainConfig) -> str | None:
    """Returns what is said before DeepSpeed compiles something for this run; None where it has nothing to compile. Raises ValueError
    where it could not, or would wait for ever."""
    needed = kernels_of(config)
    if not needed:
        return None
    for kernel in needed:
        _refuse_lock(kernel)
    missing = [kernel for kernel in needed if not list(_folder(kernel).glob(f"{kernel}*.so"))]
    if not missing:
        return None
    lacking = [tool for tool in ("c++", "ninja") if not shutil.which(tool)]
    if lacking:
        raise ValueError(
            f"{_asked(config)}: DeepSpeed compiles {', '.join(missing)} for it, and this machine has no {' and no '.join(lacking)}; "
            "install a C++ compiler and ninja (apt install g++ ninja-build), or leave it out"
        )
    if "async_io" in missing and not _has_libaio():
        raise ValueError(
            f"{_asked(config)}: DeepSpeed reads and writes files with libaio, which is not installed to compile with; install it (apt "
            "install libaio-dev, or yum install libaio-devel), or give cpu"
        )
    minutes = sum(MINUTES[kernel] for kernel in missing)
    return (
        f"DeepSpeed compiles {', '.join(missing)} at this start, once: about {minutes:g} minutes on two cores; kept in "
        f"{_folder(missing[0]).parent}"
    )


def kernels_of(config: TrainConfig) -> list[str]:
    """Names what DeepSpeed compiles for a run."""
    if not by_deepspeed(config):
        return []
    asked = config.parallel.deepspeed
    places = {asked.offload_optimizer, asked.offload_params} - {None}
    host = asked.offload_optimizer is not None and config.optim.name == "adamw"
    return [ON_HOST] * host + [kernel for kernel in FILES if places - {"cpu"}]


def _asked(config: TrainConfig) -> str:
    asked = config.parallel.deepspeed
    said = {"offload_optimizer": asked.offload_optimizer, "offload_params": asked.offload_params}
    return " ".join(f"parallel.deepspeed.{key}={value}" for key, value in said.items() if value is not None)


def _refuse_lock(kernel: str) -> None:
    """Raises ValueError for a lock that no compiler holds."""
    lock = _folder(kernel) / "lock"
    if lock.exists() and not _compiles(lock.parent):
        raise ValueError(
            f"{lock} was left by a compilation that was killed: DeepSpeed would wait for it for ever; remove {lock.parent}, and it is "
            "made again"
        )


def _compiles(folder: Path) -> bool:
    """Says whether a compiler is at work in a folder."""
    for process in psutil.process_iter(["name"]):
        if process.info["name"] in ("ninja", "cc1plus", "c++", "g++"):
            try:
                if Path(process.cwd()) == folder:
                    return True
            except psutil.Error:
                continue
    return False


def _folder(kernel: str) -> Path:
    """Where torch keeps what it compiled."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is not None:
        return Path(root) / kernel
    accelerator = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_{accelerator}" / kernel


def _has_libaio() -> bool:
    headers = [Path(root, "libaio.h") for root in ("/usr/include", "/usr/local/include")]
    flags = os.environ.get("CFLAGS", "").split()
    headers += [Path(flag.removeprefix("-I"), "libaio.h") for flag in flags if flag.startswith("-I")]
    return ctypes.util.find_library("aio") is not None and any(header.is_file() for header in headers)
