"""metrics.jsonl: one record a step, over all resumes; and what a record is made of."""

import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from rowwise.trainer.files import write_whole, writing

# Dense 16-bit peak FLOP/s by words of the device's name, from the vendors' data sheets; the first whose words are all there.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
}


class MetricsLog:
    """The metrics.jsonl of a run. Opening it after `step` drops what was written beyond: those steps come again."""

    def __init__(self, run_dir: Path, step: int):
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in _complete_lines(self._path) if json.loads(line)["step"] <= step]
        write_whole(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("ab", buffering=0)
        self.sync()

    def append(self, record: dict[str, Any]) -> None:
        """Writes one record so that it survives the death of this process: the whole line, or none of it. Raises DiskFull."""
        line, before = (json.dumps(record) + "\n").encode(), os.fstat(self._file.fileno()).st_size
        try:
            with writing(self._path):
                while line:
                    line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(before)
            raise

    def sync(self) -> None:
        """Makes what was appended survive the death of this machine: before a checkpoint counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: Path) -> list[str]:
    """The records of a file whose last line may have been cut off."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return lines[:-1]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far."""
    return [json.loads(line) for line in _complete_lines(Path(run_dir) / "metrics.jsonl")]


class MetricsTail:
    """Reads the metrics.jsonl of a run under way bit by bit. A run that is resumed writes its file anew, and what was read
    may come again."""

    def __init__(self, run_dir: Path):
        self._path, self._file, self._read = run_dir / "metrics.jsonl", 0, 0

    def read(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            if (number := os.fstat(file.fileno()).st_ino) != self._file:
                self._file, self._read = number, 0
            file.seek(self._read)
            lines = file.read().split(b"\n")[:-1]
        self._read += sum(len(line) + 1 for line in lines)
        return [json.loads(line) for line in lines]


def model_flops_utilization(flops_per_second: float, device: torch.device, peak: float | None = None) -> float | None:
    """The share of the device's 16-bit `peak`, by default what its name says; None where that is not known (a CPU, say)."""
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))
    return flops_per_second / peak if peak else None


def peak_flops(device_name: str) -> float | None:
    """The dense 16-bit peak FLOP/s of a GPU, by its name."""
    words = set(re.split(r"[ -]", device_name))
    return next((flops for key, flops in PEAK_FLOPS.items() if set(key.split()) <= words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: of tensors on a GPU, of resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
