"""What every benchmark writes beside its numbers: date, hardware, versions."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "rowwise", "torch", "triton", "accelerate", "transformers", "deepspeed", "numpy", "numba", "torchao", "liger-kernel",
    "cut-cross-entropy", "lightning",
)  # fmt: skip


def write_record(name: str, measured: dict[str, Any]) -> Path:
    """Writes results/`name`.json: `measured`, headed by when, on what and with what. Returns its path."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"date": now, "hardware": hardware(), "versions": versions(), **measured}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def hardware() -> dict[str, Any]:
    """The processor, the cores that this process may use, memory, and the GPUs by name."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """As the kernel calls it; elsewhere than on Linux, as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Of Python and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Tells the median of values that were measured in turns, their quartiles, and each."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartiles": [low, high], "all": values}
