"""What a worker does: rank 0 composes and checks the run, tells the others, and all train."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import record

from rowwise.launch.builds import check_builds
from rowwise.launch.compose import compose_tree, one_line
from rowwise.launch.given import gather
from rowwise.launch.leaving import end_told, leave_report_as_told
from rowwise.launch.outcome import Ended, Failed, Refused, clear_outcome, give_room, keep_room
from rowwise.launch.parent import follow
from rowwise.launch.streams import send_to
from rowwise.launch.workers import (
    START,
    announce,
    announce_end,
    are_logged,
    hear,
    is_one_of_many_machines,
    job_id,
    keep_freed_memory,
    restarted,
    share_end,
    tell_accelerate,
    tell_gpu,
    workers_from_environment,
)
from rowwise.parallel.mesh import Workers, pick_device
from rowwise.trainer.accelerate.fit import EngineUnfit
from rowwise.trainer.adapters.from_data import Unbegun
from rowwise.trainer.checkpoint import NoneSound
from rowwise.trainer.config import TrainConfig, config_from_tree, tree_of
from rowwise.trainer.data.integrity import DataDamaged
from rowwise.trainer.files import DiskFull, behind, want_of_room, writing
from rowwise.trainer.lock import lock_run
from rowwise.trainer.manifest import clear_interrupted, newest_sound
from rowwise.trainer.metrics import RunMoved
from rowwise.trainer.offloading import FolderUnfit
from rowwise.trainer.prepare import prepare
from rowwise.trainer.runlog import rank_log
from rowwise.trainer.spike import TooManySpikes
from rowwise.trainer.state import TrainState
from rowwise.trainer.train import train

LEAVING_SECONDS = 60  # that a worker is given to save and leave


@record
def work(overrides: list[str], command: str | None = None, tree: dict[str, Any] | None = None) -> None:
    """Finds the other workers, and runs with them what the overrides compose to: `tree`, where that is known. Raises Refused or
    Failed, on every worker, where one line tells why."""
    keep_freed_memory()
    if job_id() is not None:
        # Where torchrun is killed on one of many machines, the others restart without it: nobody waits for this one.
        follow(os.getppid(), patience_seconds=0 if is_one_of_many_machines() else LEAVING_SECONDS)
    run(lambda workers: resolve(overrides, workers, tree), workers_from_environment(), command, apart=not are_logged())


def run(
    resolve: Callable[[Workers], TrainConfig], workers: Workers, command: str | None = None, apart: bool = False
) -> TrainState:
    """Trains as one of `workers`, started by `command`, what `resolve` makes of them on rank 0, and returns the numbers it ended
    with. Raises Refused before anything is made, and Failed where the disk is full. `apart`: what ranks other than 0 say goes to
    a file of each in the folder of the run."""
    first = workers.rank == 0
    with begun(resolve, workers) if first else contextlib.nullcontext(config_from_tree(hear(workers))) as config:
        run_dir = Path(config.run_dir)
        if apart and not first:
            send_to(rank_log(run_dir, workers.rank))
        tell_gpu(run_dir)
        if config.parallel.backend == "accelerate":
            tell_accelerate(workers)
        with told_of_known_ends(run_dir, workers):
            return train(config, workers, command)


@contextlib.contextmanager
def begun(resolve: Callable[[Workers], TrainConfig], workers: Workers) -> Iterator[TrainConfig]:
    """Begins a run on rank 0: holds its folder, and gives the checked configuration, which the others are told.

    Raises Refused or Failed, which they are told instead.
    """
    run_dir, alone = None, START not in os.environ  # no agent of ours sees to the end
    try:
        config = resolve(workers)
        run_dir = Path(config.run_dir)
        with writing(run_dir):
            lock = lock_run(run_dir, job_id(), config.parallel.timeout_seconds + LEAVING_SECONDS)
            clear_outcome(run_dir)
            keep_room(run_dir)
    except (ValueError, OSError, DiskFull) as error:
        full = want_of_room(error)
        end: Ended = Refused(one_line(error)) if full is None else Failed(_told(full, run_dir))
        announce_end(workers, end)
        raise end from None
    try:
        announce(workers, tree_of(config))
        with end_told(config) if alone else contextlib.nullcontext():
            yield config
    finally:
        lock.release()
        give_room(run_dir)
        if alone:
            leave_report_as_told(config)


@contextlib.contextmanager
def told_of_known_ends(run_dir: Path, workers: Workers) -> Iterator[None]:
    """Raises Failed where one line tells the end, here or where another worker found it so.

    No half of a checkpoint is left.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = share_end(workers, _reason(error, run_dir))
        if reason is None:
            raise
        if workers.rank == 0:
            with contextlib.suppress(OSError):  # which others may be writing for a moment yet
                clear_interrupted(run_dir / "checkpoints")
        raise Failed(reason) from None


def _reason(error: BaseException, run_dir: Path) -> str | None:
    """What ended the run, where it is nothing of the program's own making."""
    if (full := want_of_room(error)) is not None:
        return _told(full, run_dir)
    for one in behind(error):
        if isinstance(one, FloatingPointError):
            saved = newest_sound(run_dir / "checkpoints")
            sound = "no checkpoint was saved before" if saved is None else f"the newest sound checkpoint is {saved}"
            return f"not a number: {one}; {sound}"
        if isinstance(one, NoneSound | RunMoved | DataDamaged | FolderUnfit | TooManySpikes | EngineUnfit | Unbegun):
            return str(one)
        if isinstance(one, OSError) and one.filename is not None:
            return _named(one)
    return None


def _told(full: BaseException, run_dir: Path | None) -> str:
    said = str(full) if isinstance(full, DiskFull) else f"disk full: {_named(full)}"
    saved = newest_sound(run_dir / "checkpoints") if run_dir is not None else None
    if saved is None:
        return f"{said}; no checkpoint was saved yet: with room there, the same command begins anew"
    return f"{said}; the newest sound checkpoint is {saved}: with room there, the same command goes on from it"


def _named(error: BaseException) -> str:
    """The file and what is wrong with it, where an error says so."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def resolve(overrides: list[str], workers: Workers, tree: dict[str, Any] | None = None) -> TrainConfig:
    """Resolves overrides to a checked configuration, on rank 0. Raises ValueError."""
    pick_device(workers.local_world_size - 1)
    return prepared(config_from_tree(tree or compose_tree(gather(overrides, "worker"))), workers)


def prepared(config: TrainConfig, workers: Workers) -> TrainConfig:
    """Returns the configuration, checked for these workers, and its folder, on rank 0. Raises ValueError."""
    if config.nproc not in (None, workers.local_world_size):
        raise ValueError(
            f"nproc={config.nproc}, but {workers.local_world_size} workers were started on this machine; leave nproc out, or "
            "let `rowwise train` start them"
        )
    if config.resume == "never" and restarted():
        config = replace(config, resume="auto")  # what this job itself has saved
    config = prepare(config, workers.world_size)
    if (told := check_builds(config)) is not None:
        print(told, flush=True)
    return config
