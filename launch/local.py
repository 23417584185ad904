"""The workers of a run on one machine: forked from a warm process, watched, and started again where that is allowed.

What torchrun tells its workers in the environment is told here in the same words.
"""

import contextlib
import json
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rowwise.launch.gate import LOOPBACK
from rowwise.launch.job import Job
from rowwise.launch.outcome import Failure, Refused, WorkersFailed
from rowwise.launch.rendezvous import START
from rowwise.launch.warm import Child, Warm, WarmIsGone, ended_by

POLL_SECONDS = 0.2
LEAVING_SECONDS = 60  # that workers are given when another has failed
NEEDED_TO_SPLIT = ("torch._dynamo",)  # which every worker that splits parameters would import for itself


def run_here(job: Job, warm: Warm, attend: Callable[[list[Child]], bool]) -> None:
    """Starts the workers, and returns once they have left. Raises WorkersFailed, or WarmIsGone.

    `attend` is called again and again with those that are there, and says whether they were asked to stop: then, and where the
    run was refused, none is started again.
    """
    name = job.name or uuid.uuid4().hex
    with _logs(job, name) as folder:
        for attempt in range(job.max_restarts + 1):
            try:
                failures = _run_once(job, warm, attend, _Start(name, folder / f"attempt_{attempt}", attempt))
            except WarmIsGone:
                if attempt == job.max_restarts or attend([]):
                    raise
                continue
            if not failures or attend([]) or any(failure.exitcode == Refused.code for failure in failures):
                break
    if failures:
        raise WorkersFailed(failures)


@contextlib.contextmanager
def _logs(job: Job, name: str) -> Iterator[Path]:
    """Where workers leave what they say, and why they failed."""
    if job.log_dir is not None:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix=f"{name}_", dir=job.log_dir))
        return
    with tempfile.TemporaryDirectory(prefix="rowwise-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class _Start:
    """One start of the workers: what it is called, where its files are, and how often there was one before."""

    def __init__(self, name: str, folder: Path, restarts: int):
        self.name, self.folder, self.restarts = name, folder, restarts
        self.id = uuid.uuid4().hex

    def error_file(self, rank: int) -> Path:
        return self.folder / str(rank) / "error.json"

    def environment(self, job: Job, rank: int, port: int) -> dict[str, str]:
        ranks: dict[str, Any] = {
            "LOCAL_RANK": rank, "RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank, "ROLE_NAME": "default",
            "LOCAL_WORLD_SIZE": job.nproc, "WORLD_SIZE": job.nproc, "GROUP_WORLD_SIZE": 1, "ROLE_WORLD_SIZE": job.nproc,
            "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, START: self.id,
            "TORCHELASTIC_RUN_ID": self.name, "TORCHELASTIC_RESTART_COUNT": self.restarts,
            "TORCHELASTIC_MAX_RESTARTS": job.max_restarts, "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_ERROR_FILE": self.error_file(rank),
        }  # fmt: skip
        return {"TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")} | {
            name: str(value) for name, value in ranks.items()
        }


def _run_once(job: Job, warm: Warm, attend: Callable[[list[Child]], bool], start: _Start) -> list[Failure]:
    store = warm.start("rowwise.launch.workers:host_store", os.getpid(), outlasts=True)
    workers = list[Child]()
    try:
        port = warm.told_by(store)
        needs = NEEDED_TO_SPLIT if job.nproc > 1 else ()
        for rank in range(job.nproc):
            logs = start.error_file(rank).parent
            logs.mkdir(parents=True)
            workers.append(
                warm.start(
                    "rowwise.launch.train:work_as", rank, job.arguments, job.tree,
                    environment=start.environment(job, rank, port),
                    logs=None if job.log_dir is None else (logs / "stdout.log", logs / "stderr.log"),
                    needs=needs,
                )
            )  # fmt: skip
        until = None
        while there := [worker for worker in workers if worker.code is None]:
            warm.watch(POLL_SECONDS)
            attend(there)
            if until is None and any(worker.code for worker in workers):
                until = time.monotonic() + LEAVING_SECONDS
                _end(workers, signal.SIGTERM)
            if until is not None and time.monotonic() > until:
                _end(workers, signal.SIGKILL)
        failed = [(worker, start.error_file(rank)) for rank, worker in enumerate(workers) if worker.code]
        return [_failure(*one) for one in sorted(failed, key=_is_consequence)]
    except WarmIsGone:
        _await_end(workers, attend)
        _end([store], signal.SIGKILL)  # what they met in, until they have saved
        while store.is_there():
            time.sleep(POLL_SECONDS / 10)
        raise
    finally:
        _end([store, *workers], signal.SIGKILL)


def _await_end(workers: list[Child], attend: Callable[[list[Child]], bool]) -> None:
    """Has workers save and leave of whose end nobody will tell."""
    until = time.monotonic() + LEAVING_SECONDS
    _end(workers, signal.SIGTERM)
    while there := [worker for worker in workers if worker.is_there()]:
        time.sleep(POLL_SECONDS)
        attend(there)
        if time.monotonic() > until:
            _end(there, signal.SIGKILL)


def _end(children: list[Child], number: int) -> None:
    for child in children:
        child.end(number)


def _is_consequence(failed: tuple[Child, Path]) -> tuple[bool, float]:
    """Where one worker fails, others fail for want of it: what was killed from outside is the cause, or who failed first."""
    worker, _ = failed
    return not worker.was_killed, worker.ended_at


def _failure(worker: Child, error_file: Path) -> Failure:
    """With what torch's `record` kept of its exception."""
    code = worker.code or 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        message = json.loads(error_file.read_bytes())["message"]
        return Failure(code, str(message["message"] if isinstance(message, dict) else message))
    return Failure(code, ended_by(code))
