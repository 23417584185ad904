"""The elastic agent of one machine: starts the workers of a run, watches them, and says how it ended.

What torchrun does, with three differences: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the workers to save and leave, and then
they are waited for as long as that takes; how the run ended is said in a word, and written to outcome.json in its folder;
and in a step of Slurm with one task a machine the agents find each other.
"""

import contextlib
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rowwise.launch.meeting import TOKEN, Meeting, address_towards, give_up_after
from rowwise.launch.outcome import OUTCOME, Ended, Failed, Outcome, Refused, State, read_outcome, write_outcome
from rowwise.launch.rendezvous import rendezvous, settings
from rowwise.launch.workers import interfaces
from rowwise.trainer.files import DiskFull
from rowwise.trainer.lock import is_held
from rowwise.trainer.manifest import newest_sound, read_manifest
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.stop import ASKED, INTERRUPTED, SIGNALS, hearing

POLL_SECONDS = 0.2
LAST_SECONDS = 2.0  # that the host of the meeting stays after its own workers
LEAVING_SECONDS = 60  # that workers are given when another has failed
PATIENCE_SECONDS = 30.0  # for agents elsewhere, once the workers of this machine have left because they were asked to


@dataclass(frozen=True)
class Job:
    """A run on this machine: its overrides, its folder, its last step (None: its workers find it), its workers.

    `name`: jobs of the same wait until the other has left the folder; `log_dir`: what each worker says goes to files there,
    and not to this one's streams; `timeout_seconds`: how long other machines are waited for.
    """

    overrides: tuple[str, ...]
    run_dir: Path
    steps: int | None
    nproc: int
    meeting: Meeting | None = None
    name: str | None = None
    timeout_seconds: float = 1800
    max_restarts: int = 0
    log_dir: Path | None = None


def default_nproc() -> int:
    """Workers of this machine where nproc is null: one a GPU, or one."""
    return torch.cuda.device_count() or 1


def require_ranks(nproc: int) -> None:
    """Raises ValueError where this machine has GPUs, and fewer than `nproc`: NCCL gives each worker one of its own."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < nproc:
        raise ValueError(f"nproc={nproc}: this machine has {gpus} GPUs; give nproc={gpus} at most, or more machines")


def crowding(nproc: int) -> str | None:
    """What is to be known of more workers than this machine has cores, which share them. With GPUs they need none."""
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.device_count() or nproc <= cores:
        return None
    return f"nproc={nproc} on {cores} cores: workers take turns, so that a step takes longer; nothing else changes"


def run_workers(job: Job, relay: bool = False) -> Outcome:
    """Starts the workers, restarts them where `job` allows it, and returns once they have ended. Writes outcome.json.

    Call it in the main thread: signals come there. (torch's agent runs in another, where it does not handle them.)
    `relay`: a signal that stopped them is raised once more for the handler of before.
    """
    # How it ended is said here, in a word.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    if (warning := crowding(job.nproc)) is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    began, ended = time.time(), queue.SimpleQueue[BaseException | None]()
    forwarding = Forwarding()
    with hearing(forwarding.receive), _environment(job):
        threading.Thread(target=_agent, args=(job, ended), daemon=True).start()
        while ended.empty() and not forwarding.abandoned:
            time.sleep(POLL_SECONDS)
            forwarding.pass_on()
            if job.meeting is not None:
                give_up_after(job.timeout_seconds)
    error = None if ended.empty() else ended.get()
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


@contextlib.contextmanager
def _environment(job: Job) -> Iterator[None]:
    """What workers inherit: on a CPU they share its cores, unless it says otherwise; those of one machine listen on its
    loopback alone, and no module of the working directory takes the place of another, whatever it says. The token is not
    theirs, nor what they start's: they come in through the door of their machine."""
    given = {"PYTHONSAFEPATH": "1"}
    given |= {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": _threads(job.nproc)}
    given |= {} if job.meeting else interfaces()
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


def _agent(job: Job, ended: "queue.SimpleQueue[BaseException | None]") -> None:
    try:
        # Whoever gives up sooner than the workers do does so while they still may go on.
        with rendezvous(job.meeting, max(60, job.timeout_seconds)) as make, _logs(job) as logs:
            program = ("-m", "rowwise.launch.train", "--agent", *job.overrides)
            elastic_launch(_launch_config(job, make, logs), sys.executable)(*program)
            if job.meeting is not None and job.meeting.host:
                time.sleep(LAST_SECONDS)  # for those that come last
        ended.put(None)
    except BaseException as error:
        ended.put(error)


@contextlib.contextmanager
def _logs(job: Job) -> Iterator[DefaultLogsSpecs]:
    """Where workers leave what they say, and why they failed. torch would leave a folder behind for each run."""
    if job.log_dir is not None:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        yield DefaultLogsSpecs(log_dir=str(job.log_dir), redirects=Std.ALL)
        return
    with tempfile.TemporaryDirectory(prefix="rowwise-", ignore_cleanup_errors=True) as folder:
        yield DefaultLogsSpecs(log_dir=folder, redirects=Std.NONE)


def _launch_config(
    job: Job, make: Callable[[RendezvousParameters], RendezvousHandler], logs: DefaultLogsSpecs
) -> LaunchConfig:
    options: dict[str, Any] = {}
    if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)):  # not in torch 2.11
        options["shutdown_timeout"] = LEAVING_SECONDS
    meeting = job.meeting
    return LaunchConfig(
        min_nodes=meeting.least if meeting else 1,
        max_nodes=meeting.most if meeting else 1,
        nproc_per_node=job.nproc,
        run_id=meeting.job if meeting else job.name or uuid.uuid4().hex,
        logs_specs=logs,
        local_addr=address_towards(*meeting.address) if meeting else None,
        max_restarts=job.max_restarts,
        **settings(make),
        **options,
    )


class Forwarding:
    """Passes the signals that ask a run to stop on to its workers, those that start later included.

    `abandoned`: the workers have left, and agents elsewhere keep this one waiting.
    """

    def __init__(self) -> None:
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
            print(ASKED, file=sys.stderr, flush=True)
        self.requested = number

    def pass_on(self) -> None:
        """To be called again and again."""
        if self.requested is None:
            return
        workers = [child for child in psutil.Process().children() if _is_worker(child)]
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


def _last_step(run_dir: Path) -> int:
    """How far the records reach; 0 where they do not tell."""
    with contextlib.suppress(OSError):
        return max((record["step"] for record in read_metrics(run_dir)), default=0)
    return 0


def _recorded_steps(run_dir: Path) -> int:
    """The steps of the run, which its workers have written beside what they were asked for."""
    return int(OmegaConf.load(run_dir / "config.yaml").steps)


def _outcome(job: Job, error: BaseException | None, asked_to_stop: bool) -> Outcome:
    step = _last_step(job.run_dir)
    # One that is asked before it hears, or when it no longer does, dies of it, and others for want of it.
    failures = list(error.failures.values()) if isinstance(error, ChildFailedError) else []
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
    return Outcome("failed", f"{type(error).__name__}: {error}", step)


def _why(failure: ProcessFailure) -> tuple[State, str]:
    """The state and the reason of a worker's end, from its exit code and what torch's `record` kept of its exception."""
    message = failure.message
    text = str(message.get("message", message) if isinstance(message, dict) else message)
    for end in (Refused, Failed):
        if text.startswith(f"{end.__name__}: "):
            return end.state, text.removeprefix(f"{end.__name__}: ")
    if failure.exitcode == -signal.SIGKILL:
        return "failed", "killed (SIGKILL), as the kernel does to a process when memory runs out"
    if any(word in text for word in ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError")):
        return "failed", f"out of memory: {text}"
    if "FloatingPointError" in text:
        return "failed", f"not a number: {text.removeprefix('FloatingPointError: ')}"
    return "failed", text


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
