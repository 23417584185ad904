"""A model that is larger than memory, trained from files in a container of 4 GiB: its losses are those of a run that has all memory.

    python benchmarks/larger_than_memory.py FOLDER                 1.6 billion parameters, 25 GB of rows, and 6 GB to begin from
    python benchmarks/larger_than_memory.py FOLDER --layers 8 --ordinary

The model is a Llama of 2,048 channels in float32 under AdamW: with gradients 16 bytes a parameter. The runs are `rowwise train`, one
rank, one after the other, with the same words but where they say otherwise:

    limited      in a memory cgroup of `--limit` bytes, which counts the cache of files too; parameters, gradients and states in
                 files of FOLDER
    unlimited    the same, in no cgroup
    ordinary     nothing in files, in no cgroup (`--ordinary`: where it fits this machine); and once more in the cgroup, which ends it

Of each: the losses of its steps, which must be equal to the last digit; seconds a step, of which the first learns in which order
blocks are read; the most bytes that the cgroup charged, and the most of them that were no cache (sampled ten times a second); what
its processes read from the disk and wrote to it. FOLDER is on the disk to be used. Root, and cgroups of version 1 or 2.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_record

from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import parameter_count, parameter_specs
from rowwise.trainer.models.huggingface import write_folder

CGROUPS = Path("/sys/fs/cgroup")
STEPS = 2
VOCABULARY = 8192
SHAPE = {"dim": 2048, "heads": 16, "kv_heads": 16, "ffn_dim": 5632, "vocab_size": VOCABULARY}


@dataclass
class Group:
    """A memory cgroup, and the most that was seen in it."""

    path: Path
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def first_version(self) -> bool:
        return (self.path / "memory.limit_in_bytes").exists()

    def limit(self, size: int) -> None:
        (self.path / ("memory.limit_in_bytes" if self.first_version else "memory.max")).write_text(str(size))

    def sample(self) -> None:
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        told = "total_rss" if self.first_version else "anon"
        usage = "memory.usage_in_bytes" if self.first_version else "memory.current"
        now = {"charged_bytes": int((self.path / usage).read_text()), "no_cache_bytes": int(stat[told])}
        self.peaks = {key: max(size, self.peaks.get(key, 0)) for key, size in now.items()}

    def enter(self) -> None:
        """Puts the process that calls it, and all it starts, into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def memory_group(limit: int | None) -> Iterator[Group]:
    """Makes a cgroup for one run; without a limit it only counts."""
    parent = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = Group(parent / f"rowwise-{os.getpid()}")
    group.path.mkdir()
    try:
        if limit is not None:
            group.limit(limit)
        yield group
    finally:
        group.path.rmdir()


def run(words: list[str], limit: int | None, folder: Path) -> dict[str, Any]:
    """Makes one run, and tells what was measured of it."""
    with memory_group(limit) as group, tempfile.TemporaryDirectory(dir=folder) as run_dir:
        command = [sys.executable, "-m", "rowwise.launch.cli", "train", *words, f"run_dir={run_dir}/run"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(os.cpu_count())}
        began, read, written = time.perf_counter(), *disk_bytes(folder)
        process = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=group.enter,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[str] = []
        listener = threading.Thread(target=lambda: said.extend(process.stdout or []))
        listener.start()
        while process.poll() is None:
            group.sample()
            time.sleep(0.1)
        listener.join()
        read_after, written_after = disk_bytes(folder)
        kept = Path(run_dir) / "run/metrics.jsonl"
        records = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        found = {
            "ended": "well"
            if not process.returncode
            else next((line.strip(" ─\n") for line in said if "killed" in line or "failed" in line), "badly"),
            "losses": [record["loss"] for record in records if "loss" in record],
            "norms": [record["grad_norm"] for record in records if "loss" in record],
            "step_seconds": [record["step_seconds"] for record in records if "loss" in record],
            "seconds": time.perf_counter() - began,
            **group.peaks,
            "disk_bytes_read": read_after - read,
            "disk_bytes_written": written_after - written,
        }
        if process.returncode and limit is None:
            sys.exit("".join(said[-30:]))
        return found


def disk_bytes(folder: Path) -> tuple[int, int]:
    """Tells what the disk of a folder has read and written since the machine began."""
    device = folder.stat().st_dev
    words = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return 512 * int(words[2]), 512 * int(words[6])


def model_of(layers: int) -> ModelConfig:
    """The model of so many layers, as `words_of` says it too."""
    return ModelConfig(name="larger", layers=layers, **SHAPE)


def words_of(layers: int, folder: Path) -> list[str]:
    """What is said of every run. They begin from weights that are drawn here: the product's own, which are the same on
    every layout, take a core a quarter of an hour."""
    tokens, source = folder / "tokens.bin", folder / "source"
    np.random.default_rng(1).integers(1, VOCABULARY, 100_000).astype(np.uint16).tofile(tokens)
    source.mkdir()
    random = torch.Generator().manual_seed(1)
    model = model_of(layers)

    def draw(tensors: dict[str, torch.Tensor]) -> None:
        for t in tensors.values():
            t.fill_(1) if t.ndim == 1 else t.normal_(0.0, 0.02, generator=random)

    write_folder(
        source, their_config(model, torch.float32, 128, None), parameter_specs(model), draw, torch.float32, 10**9
    )
    return [
        f"model.init_from={source}",
        "nproc=1", "name=larger", f"steps={STEPS}", "precision=fp32", "data=tokens", f"data.files=[{tokens}]",
        "data.separator=0", "data.holdout=0", "batch.global_size=1", "batch.micro_size=1", "batch.seq_len=128", "schedule=constant",
        "optim=adamw", "optim.lr=1e-4", "clip_norm=1.0", "eval.every=0", "sample.tokens=0", "checkpoint.every=0",
        "checkpoint.background=false", "log_every=1", "parallel.zero=3", "memory.fit=false", "report=never", "resume=never",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--limit", type=int, default=4 << 30)
    parser.add_argument("--ordinary", action="store_true")
    parser.add_argument("--in-backward", action="store_true", help="parameters step as their gradients come, unclipped")
    parser.add_argument("--name", default="larger_than_memory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        measure(given, Path(folder))


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Makes all runs in a folder, and writes what was found."""
    words = words_of(given.layers, folder)
    away = [f"memory.offload_{kind}={folder}" for kind in ("params", "states", "gradients")]
    if given.in_backward:
        words, away = [*words, "clip_norm=0", "optim.in_backward=true"], away[:2]
    runs = {"limited": ([*words, *away], given.limit)}
    if given.ordinary:
        runs |= {"ordinary": (words, None), "ordinary, limited": (words, given.limit)}
    else:
        runs |= {"unlimited": ([*words, *away], None)}
    found = {}
    for name, (said, limit) in runs.items():
        found[name] = run(said, limit, folder)
        print(name, json.dumps(found[name]), flush=True)
    parameters = parameter_count(model_of(given.layers))[0]
    path = write_record(
        given.name,
        {"parameters": parameters, "rows_bytes": 16 * parameters, "limit": given.limit, "words": words, "runs": found},
    )
    whole = [one for name, one in found.items() if name != "ordinary, limited"]
    assert all(one["ended"] == "well" for one in whole), whole
    assert len({(tuple(one["losses"]), tuple(one["norms"])) for one in whole}) == 1, "the losses differ"
    print(path)


if __name__ == "__main__":
    main()
