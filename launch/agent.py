"""The elastic agent of one machine: starts the workers of a run, watches them, and says how it ended.

What torchrun does, with three differences: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the workers to save and leave, and then
they are waited for as long as that takes; how the run ended is said in a word, and written to outcome.json in its folder;
and in a step of Slurm with one task a machine the agents find each other.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

import psutil
from omegaconf import OmegaConf

from rowwise.launch.job import Job
from rowwise.launch.local import POLL_SECONDS, run_here
from rowwise.launch.outcome import (
    OUTCOME,
    Ended,
    Failed,
    Failure,
    Outcome,
    Refused,
    State,
    WorkersFailed,
    cause_of,
    read_outcome,
    write_outcome,
)
from rowwise.launch.rendezvous import LOGGED, TOKEN, give_up_after, interfaces
from rowwise.launch.warm import Child, Warm, WarmIsGone, warmed
from rowwise.trainer.files import DiskFull
from rowwise.trainer.lock import is_held
from rowwise.trainer.manifest import newest_sound, read_manifest
from rowwise.trainer.metrics import last_step
from rowwise.trainer.runlog import keep_said
from rowwise.trainer.screen import CLEAR, is_terminal
from rowwise.trainer.stop import ASKED, INTERRUPTED, SIGNALS, hearing

PATIENCE_SECONDS = 30.0  # for agents elsewhere, once the workers of this machine have left because they were asked to


def crowding(nproc: int, gpus: int) -> str | None:
    """Returns what is to be known of more workers than this machine has cores, which share them. With GPUs they need none."""
    cores = len(os.sched_getaffinity(0))
    if gpus or nproc <= cores:
        return None
    return f"nproc={nproc} on {cores} cores: workers take turns, so that a step takes longer; nothing else changes"


def run_workers(job: Job, warm: Warm | None = None, relay: bool = False) -> Outcome:
    """Starts the workers, restarts them where `job` allows it, and returns once they have ended. Writes outcome.json.

    Call it in the main thread: signals come there. `warm`: what forks the workers of one machine, where there is such already.
    `relay`: a signal that stopped them is raised once more for the handler of before.
    """
    if (warning := crowding(job.nproc, job.gpus)) is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    began, forwarding, error = time.time(), Forwarding(job.run_dir), None
    with hearing(forwarding.receive), _environment(job):
        try:
            _run_here(job, warm, forwarding) if job.rendezvous is None else _run_with_others(job, forwarding)
        except Exception as what:
            error = what
    outcome = _outcome(job, error, forwarding.requested is not None)
    if job.run_dir.is_dir() and not is_held(job.run_dir) and not _better_said(job.run_dir, outcome, began):
        try:
            write_outcome(job.run_dir, outcome)
        except (DiskFull, OSError) as error:
            if not outcome.has_cause:  # which is told, and most likely is this one
                print(f"warning: how the run ended is not written down: {error}", file=sys.stderr, flush=True)
    if relay and forwarding.requested is not None:
        signal.raise_signal(forwarding.requested)
    return outcome


def _run_here(job: Job, warm: Warm | None, forwarding: "Forwarding") -> None:
    def attend(workers: list[Child]) -> bool:
        forwarding.pass_on(workers)
        return forwarding.requested is not None

    with warmed() if warm is None else contextlib.nullcontext(warm) as forks:
        run_here(job, forks, attend)


def _run_with_others(job: Job, forwarding: "Forwarding") -> None:
    # torch, which takes seconds, and which the workers of one machine are forked with.
    from rowwise.launch.elastic import run_agent

    ended = queue.SimpleQueue[BaseException | None]()
    threading.Thread(target=run_agent, args=(job, ended), daemon=True).start()
    while ended.empty() and not forwarding.abandoned:
        time.sleep(POLL_SECONDS)
        forwarding.pass_on([child for child in psutil.Process().children() if _is_worker(child)])
        give_up_after(job.timeout_seconds)
    error = None if ended.empty() else ended.get()
    if error is not None:
        raise error


@contextlib.contextmanager
def _environment(job: Job) -> Iterator[None]:
    """What workers inherit: on a CPU they share its cores, unless it says otherwise; those of one machine listen on its
    loopback alone, and no module of the working directory takes the place of another, whatever it says. The token is not
    theirs, nor what they start's: they come in through the door of their machine."""
    given = {"PYTHONSAFEPATH": "1"}
    given |= {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": _threads(job.nproc)}
    given |= {} if job.rendezvous else interfaces()
    given |= {} if job.log_dir is None else {LOGGED: "1"}
    before = {name: os.environ.get(name) for name in (TOKEN, *given)}
    os.environ.update(given)
    os.environ.pop(TOKEN, None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _threads(nproc: int) -> str:
    return "1" if nproc > 1 else str(len(os.sched_getaffinity(0)))


class Worker(Protocol):
    """A process that can be asked to stop."""

    @property
    def pid(self) -> int: ...

    def send_signal(self, sig: int, /) -> None: ...


class Forwarding:
    """Passes the signals that ask a run to stop on to its workers, those that start later included.

    `abandoned`: the workers have left, and agents elsewhere keep this one waiting.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self._run_dir = run_dir
        self.requested: int | None = None
        self.abandoned = False
        self._told: set[int] = set()
        self._twice = False
        self._alone_since: float | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            self._told.clear()  # Ctrl-C again: see trainer.stop
            self._twice = True
        elif self.requested is None:
            # Over the bar of the worker that has the same terminal.
            print(f"{CLEAR if is_terminal(sys.stderr) else ''}{ASKED}", file=sys.stderr, flush=True)
            if self._run_dir is not None:
                keep_said(self._run_dir, ASKED)
        self.requested = number

    def pass_on(self, workers: Sequence[Worker]) -> None:
        """Passes signals on to the workers that are there. To be called again and again."""
        if self.requested is None:
            return
        for worker in workers:
            if worker.pid not in self._told:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just left
                    worker.send_signal(signal.SIGINT if self._twice else signal.SIGTERM)
                self._told.add(worker.pid)
        self._alone_since = None if workers else self._alone_since or time.monotonic()
        self.abandoned = self._alone_since is not None and time.monotonic() - self._alone_since > PATIENCE_SECONDS


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "rowwise.launch.train" in process.cmdline()
    except psutil.Error:
        return False


def _recorded_steps(run_dir: Path) -> int:
    """The steps of the run, which its workers have written beside what they were asked for."""
    return int(OmegaConf.load(run_dir / "config.yaml").steps)


def _outcome(job: Job, error: Exception | None, asked_to_stop: bool) -> Outcome:
    step = last_step(job.run_dir)
    # One that is asked before it hears, or when it no longer does, dies of it, and others for want of it.
    failures = error.failures if isinstance(error, WorkersFailed) else []
    deaf = any(failure.exitcode == INTERRUPTED or -failure.exitcode in SIGNALS for failure in failures)
    if error is None or (asked_to_stop and deaf):
        saved = newest_sound(job.run_dir / "checkpoints")
        if saved is not None and read_manifest(saved)["step"] >= (job.steps or _recorded_steps(job.run_dir)):
            return Outcome("complete", None, step)
        return Outcome("stopped", "asked to stop", step)
    if failures:
        told = [Outcome(*_why(failure), step) for failure in failures]
        # Where one worker fails, the others fail for want of it.
        return max(told, key=lambda outcome: outcome.has_cause)
    if isinstance(error, Ended):
        return Outcome(error.state, str(error), step)
    if isinstance(error, WarmIsGone):
        return Outcome("failed", str(error), step)
    return Outcome("failed", f"{type(error).__name__}: {error}", step)


def _why(failure: Failure) -> tuple[State, str]:
    """The state and the reason of a worker's end."""
    text = failure.message
    for end in (Refused, Failed):
        if text.startswith(f"{end.__name__}: "):
            return end.state, text.removeprefix(f"{end.__name__}: ")
    if failure.exitcode == -signal.SIGKILL:
        return "failed", "killed (SIGKILL), as the kernel does to a process when memory runs out"
    return "failed", cause_of(text)


def _better_said(run_dir: Path, outcome: Outcome, began: float) -> bool:
    """Whether the agent of another machine has written the cause of what is only a consequence here, or a run that was
    refused finds how the one before it ended."""
    path = run_dir / OUTCOME
    if outcome.state == "refused":
        return path.exists()
    if outcome.state not in ("failed", "stopped") or not path.exists() or path.stat().st_mtime < began:
        return False
    told = read_outcome(run_dir)
    return told is not None and told.has_cause
