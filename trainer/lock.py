"""The lock of a run's folder: held by the run that is under way there. Needs no torch."""

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
JOB = ".job"
LOOK_SECONDS = 0.2  # longer than anybody who looks whether a lock is held is in its way


def lock_run(run_dir: Path, job: str | None = None, patience_seconds: float = 0) -> FileLock:
    """Holds the run directory for this run, until released or the process ends. Raises ValueError where another run
    holds it. Where it is a run of the same job, one that was cut off and not yet given up, it is waited for."""
    lock, holder, ours = FileLock(run_dir / LOCK), run_dir / JOB, "" if job is None else job
    theirs = ""
    with contextlib.suppress(OSError):
        theirs = holder.read_text(errors="replace")
    try:
        lock.acquire(timeout=max(LOOK_SECONDS, patience_seconds if ours and ours == theirs else 0))
        holder.write_text(ours)
    except Timeout:
        raise ValueError(f"run_dir={run_dir} is in use by another run; wait for it, or give another name") from None
    return lock


def is_held(folder: Path) -> bool:
    """Says whether a run, or a sweep, is under way there. Any number may look at the same time; one that begins just then waits."""
    path = folder / LOCK
    if fcntl is None:
        return _is_taken(path)
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:  # nobody has locked it yet
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks of this kind there
        return _is_taken(path)
    finally:
        os.close(file)
    return False


def _is_taken(path: Path) -> bool:
    """Whether another process has the lock, found by taking it."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # no lock can be had there, by no run
        return False
