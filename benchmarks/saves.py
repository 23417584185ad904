"""How long a save blocks the loop: in the background, in the foreground, and by plain torch.distributed.checkpoint."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestants import Job
from torch import Tensor

from rowwise.kernels.rows import local

STEPS_BESIDE = 4  # after each save: long enough to write beside


def saves(job: Job, folder: Path, repeats: int = 5) -> dict[str, Any]:
    """How long each way to save blocks the loop, on the slowest rank, and how much longer the steps beside it take."""
    from rowwise.launch.compose import compose_tree
    from rowwise.launch.workers import workers_from_environment
    from rowwise.optim.build import build_optimizer
    from rowwise.parallel.mesh import make_mesh
    from rowwise.trainer.build import build_model
    from rowwise.trainer.check import check
    from rowwise.trainer.checkpoint import Saver
    from rowwise.trainer.config import config_from_tree
    from rowwise.trainer.data.open import open_data
    from rowwise.trainer.feed import train_batches
    from rowwise.trainer.parallelize import parallelize
    from rowwise.trainer.states import tensors_of
    from rowwise.trainer.step import StepInput, compute_gradients

    config = check(config_from_tree(compose_tree([*job.overrides, f"run_dir={folder}"])), job.workers)
    mesh = make_mesh(config.parallel, workers_from_environment())
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    engine, _ = parallelize(build_model(config, mesh), config, mesh)
    model = engine.model
    optimizer = build_optimizer(model, config.optim)
    tensors, batches = (tensors_of(model, optimizer), train_batches(config, mesh, data, position=0))

    def step() -> None:
        compute_gradients(engine, mesh, StepInput(1, next(batches), config.batch.positions, config.clip_norm))
        optimizer.step()
        optimizer.zero_grad()

    savers = {
        "background": Saver(folder / "background", mesh, keep=1, background=True),
        "foreground": Saver(folder / "foreground", mesh, keep=1, background=False),
        "plain": PlainSaver(folder / "plain"),
    }
    step()
    measured = measure_saves(savers, step, tensors, mesh.device, repeats)
    state_bytes = torch.tensor(local_bytes(tensors), device=mesh.device)
    dist.all_reduce(state_bytes)
    dist.destroy_process_group()
    return {"state_bytes": int(state_bytes), "repeats": repeats, **measured}


class PlainSaver:
    """torch.distributed.checkpoint and nothing else: no checksums, no manifest, no commit."""

    def __init__(self, folder: Path):
        self._folder = folder

    def save(self, step: int, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(self._folder / str(step)))

    def wait(self) -> None: ...


def local_bytes(tensors: dict[str, Any]) -> int:
    """Of this rank's shards."""
    return sum(local(t).numel() * t.element_size() for t in tensors.values())


def measure_saves(
    savers: dict[str, Any], step: Callable[[], None], tensors: dict[str, Tensor], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Medians over `repeats`, the ways in turn. `blocked_seconds`: until `save` returns. `steps_seconds`: of
    STEPS_BESIDE steps after it, and of waiting for what is not written then; `idle` has them with no save at all."""
    seconds: dict[str, list[list[float]]] = {way: [] for way in ("idle", *savers)}
    for repeat in range(repeats):
        for way in seconds:
            marks = torch.zeros(2, dtype=torch.float64, device=device)
            dist.barrier()
            started = time.perf_counter()
            if way in savers:
                savers[way].save(repeat, tensors, {})
            marks[0] = time.perf_counter() - started
            for _ in range(STEPS_BESIDE):
                step()
            if way in savers:
                savers[way].wait()
            marks[1] = time.perf_counter() - started - marks[0]
            dist.all_reduce(marks, dist.ReduceOp.MAX)
            seconds[way].append(marks.tolist())
    names = ("blocked_seconds", "steps_seconds")
    return {way: dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True)) | {"all": rows}
            for way, rows in seconds.items()}  # fmt: skip
