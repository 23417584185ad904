"""Whole runs in tests: in the pool of ranks, or as processes of their own that can be killed."""

import contextlib
import faulthandler
import io
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from parity import TOLERANCE, relative_error
from ranks import quick_start
from rowwise.parallel.mesh import Workers
from rowwise.trainer import train as training
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.memory import Watch
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.prepare import make_writable
from rowwise.trainer.state import TrainState
from rowwise.trainer.train import train

SAME_EVERYWHERE = ("step", "loss", "grad_norm", "lr", "tokens")


def named(config: TrainConfig, folder: Path, name: str) -> TrainConfig:
    """The same run in the folder of that name."""
    return replace(config, run_dir=str(folder / name))


def run_watched(workers: Workers, config: TrainConfig) -> TrainState:
    """One rank of a run."""
    if workers.rank == 0:
        make_writable(Path(config.run_dir))
    return train(config, workers)


def run_train(workers: Workers, config: TrainConfig) -> TrainState:
    """One rank of a run whose first step is not watched, which takes as long as three others and changes no number: see
    tests/test_trainer_plan.py, and tests/test_composition.py, where all are watched. It has no memory.json."""
    with mock.patch.object(training, "watching", unwatched):
        return run_watched(workers, config)


@contextlib.contextmanager
def unwatched(*given: object) -> Iterator[Watch]:
    yield Watch(None, first=False)


def run_said(workers: Workers, config: TrainConfig) -> str:
    """One rank of a run; what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        run_train(workers, config)
    return said.getvalue()


def run_until(workers: Workers, config: TrainConfig, stop_at: int) -> TrainState:
    """A run whose last rank receives SIGTERM as it begins step `stop_at`, counted from where the run once began."""
    from rowwise.trainer.data.batches import Prefetch

    done = next((read_manifest(c)["step"] for c in complete_checkpoints(Path(config.run_dir) / "checkpoints")), 0)
    original, calls = Prefetch.__next__, iter(range(done + 1, stop_at + 1))

    def counted(self):
        if next(calls, None) == stop_at and workers.rank == workers.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Prefetch.__next__ = counted  # type: ignore[method-assign]
    try:
        return run_train(workers, config)
    finally:
        Prefetch.__next__ = original  # type: ignore[method-assign]


def final_tensors(run_dir: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    return tensors_in(complete_checkpoints(Path(run_dir) / "checkpoints")[0])


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def records(run_dir: str | Path) -> list[tuple]:
    """What must be the same in metrics.jsonl, however often the run was stopped."""
    return [tuple(record[key] for key in SAME_EVERYWHERE) for record in read_metrics(Path(run_dir))]


def assert_same_run(run_dir: str, other_dir: str) -> None:
    """Law 3 between two runs that end at one step: records, evaluations and every tensor of the last checkpoint."""
    np.testing.assert_allclose(np.array(records(run_dir)), np.array(records(other_dir)), rtol=TOLERANCE)
    evaluated = [[r["eval_loss"] for r in read_metrics(Path(d)) if "eval_loss" in r] for d in (run_dir, other_dir)]
    assert evaluated[0], "nothing was evaluated"
    np.testing.assert_allclose(*evaluated, rtol=TOLERANCE)
    ours, theirs = final_tensors(run_dir), final_tensors(other_dir)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        # Equal, which a state that is zero by right can be, or near to it.
        assert torch.equal(tensor, theirs[key]) or relative_error(tensor, theirs[key]) <= TOLERANCE, key


def assert_resumes_to_the_last_bit(ranks, world: int, config: TrainConfig, folder: Path, stop_at: int) -> None:
    """Law 3 on one layout."""
    whole, stopped = named(config, folder, "whole"), named(config, folder, "stopped")
    ranks.run(run_train, world, whole)
    ranks.run(run_until, world, stopped, stop_at)
    ranks.run(run_train, world, stopped)
    assert records(whole.run_dir) == records(stopped.run_dir)
    theirs = final_tensors(whole.run_dir)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in final_tensors(stopped.run_dir).items())


def stores(world_size: int) -> list[Workers]:
    """Workers that share a store, each by a connection of its own, as processes do."""
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    others = [dist.TCPStore("localhost", host.port) for _ in range(1, world_size)]
    return [Workers(r, world_size, r, world_size, store) for r, store in enumerate([host, *others])]


class Job:
    """A run in processes of their own."""

    def __init__(self, config: TrainConfig, world_size: int, log: Path):
        context = quick_start()
        self.log = log
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, self.store.port, config, log))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self, rank: int) -> bool:
        """SIGKILL to one rank; False where it had already ended."""
        process = self.processes[rank]
        if not process.is_alive():
            return False
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def wait(self, timeout_seconds: float) -> list[int | None]:
        """The exit codes, once all have ended. Raises TimeoutError for a hang, with where each rank was and what was
        said."""
        deadline = time.monotonic() + timeout_seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.alive():
            for process in self.processes:
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGQUIT)
            time.sleep(2)
            self.end()
            raise TimeoutError(f"ranks still alive after {timeout_seconds} s:\n{self.log.read_text()[-6000:]}")
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """What torchrun does once a worker has died: the others go too, most of them in the middle of something."""
        for process in self.processes:
            process.kill()
            process.join()


def await_instant(job: Job, instants: random.Random) -> bool:
    """Waits a random time from the start of the job: set-up, resuming and training are all hit."""
    until = time.monotonic() + instants.uniform(0.05, 2.0)
    while job.alive() and time.monotonic() < until:
        time.sleep(0.001)
    return False


def await_save(job: Job, config: TrainConfig, number: int) -> bool:
    """Waits until this job has begun to write its first checkpoint, or its second."""
    checkpoints = Path(config.run_dir) / "checkpoints"
    seen = _under_way(checkpoints)
    while job.alive():
        if begun := _under_way(checkpoints) - seen:
            seen |= begun
            number -= 1
            if not number:
                return True
        time.sleep(0.0002)
    return False


def assert_survives_kills(ranks, folder: Path, config: TrainConfig, wanted: int) -> None:
    """SIGKILL to a rank of a run on two that has no end: one in two at a random instant, one in two while a checkpoint is being
    written; then it is given an end a few steps ahead, however far it got. It has the records and tensors of a run that was never
    killed, and each record once."""
    log, random_instants = folder / "log", random.Random(2026)
    in_saves, kills, kills_in_save = -(-wanted // 3), 0, 0
    for attempt in range(4 * wanted):
        there = bool(complete_checkpoints(Path(config.run_dir) / "checkpoints"))
        if kills >= wanted and kills_in_save >= in_saves and there:
            break
        job = Job(config, 2, log)
        # In its first save or, so that the run gets on, in its second.
        in_save = await_save(job, config, 1 + attempt // 2 % 2) if attempt % 2 else await_instant(job, random_instants)
        killed = job.kill(random_instants.randrange(2))
        kills += killed
        kills_in_save += killed and in_save
        assert killed, f"the job ended before it was killed: {log.read_text()[-2000:]}"
        time.sleep(random_instants.uniform(0, 0.2))
        job.end()
    assert kills >= wanted
    assert kills_in_save >= in_saves
    assert complete_checkpoints(Path(config.run_dir) / "checkpoints"), "the kills left nothing to go on from"
    reached = read_metrics(Path(config.run_dir))[-1]["step"]
    config = replace(config, steps=reached + 5)
    assert Job(config, 2, log).wait(timeout_seconds=600) == [0, 0], log.read_text()[-3000:]  # a hang says where

    whole = replace(config, run_dir=str(folder / "whole"), checkpoint=replace(config.checkpoint, every=0))
    ranks.run(run_train, 2, whole)
    assert len(records(config.run_dir)) == config.steps
    assert records(config.run_dir) == records(whole.run_dir)
    ours, theirs = final_tensors(config.run_dir), final_tensors(whole.run_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((Path(config.run_dir) / "checkpoints").glob("*.incomplete"))


def _under_way(checkpoints: Path) -> set[tuple[str, int]]:
    """The checkpoints that are being written, or were when their job was killed."""
    found = set()
    for path in checkpoints.glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def _rank(rank: int, world_size: int, port: int, config: TrainConfig, log: Path) -> None:
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    faulthandler.register(signal.SIGQUIT, sys.stderr)  # see `Job.wait`
    torch.set_num_threads(1)
    try:
        run_train(Workers(rank, world_size, rank, world_size, dist.TCPStore("localhost", port)), config)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def manifest_at(step: int) -> dict:
    """A manifest in the form that is written, of a model that no run has."""
    parts = {key: {} for key in ("batch", "data", "model", "optim", "precision", "schedule")}
    return {
        "step": step,
        "tokens": 100 * step,
        "state": TrainState(step, 8 * step, 100 * step, step).to_tree(),
        "precision": "fp32",
        "model": {},
        "states": {},
        "data": {},
        "fingerprint": {"config": "a", "data": "b"},
        "layout": {"world_size": 1},
        "config": {"resume": "auto", "steps": 10, **parts},
        "records": {"began": 0, "sha256": None},
    }
