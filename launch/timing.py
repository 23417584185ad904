"""Where the time of a start goes: `rowwise train` is started for real, in a folder that is removed, and looked at from outside.

What a run writes says when it got there: `.job` once the configuration and the data are examined, parameters.txt once the
communicators, the model and the optimizer are made, metrics.jsonl with its first record. Then it is asked to stop, and saves.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rowwise.launch.compose import key_of
from rowwise.launch.overrides import quoted

ROUNDS = 2  # the first also reads files that the second finds in memory
POLL_SECONDS = 0.01
GIVE_UP_SECONDS = 3600
LEFT_OUT = ("run_dir", "name", "resume", "tracker")
MARKS = (
    ("imports, examining configuration and data", ".job"),
    ("communicators, model, optimizer", "parameters.txt"),
    ("first step", "metrics.jsonl"),
)


def time_starts(overrides: list[str]) -> int:
    """Prints what each phase took, and returns the exit code of the run that failed, or 0."""
    kept = [word for word in overrides if key_of(word).partition(".")[0] not in LEFT_OUT]
    print(
        f"\nstarting: rowwise train {' '.join(kept)}\n(to its first step and a checkpoint, in a folder that is removed)"
    )
    imports = {
        what: _import_seconds(module)
        for what, module in (("torch", "torch"), ("torch and Rowwise", "rowwise.launch.worker"))
    }
    rounds = []
    for _ in range(ROUNDS):
        code, seconds = _time_start(kept)
        if code:
            return code
        rounds.append(seconds)
    for what, taken in imports.items():
        print(f"{taken:8.2f} s  a process that imports {what} and leaves")
    for what in rounds[0]:
        print("".join(f"{seconds[what]:8.2f} s" for seconds in rounds) + f"  {what}")
    return 0


def _import_seconds(module: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-P", "-c", f"import {module}"], check=True)
    return time.monotonic() - began


def _time_start(overrides: list[str]) -> tuple[int, dict[str, float]]:
    """(exit code, what -> seconds) of one start."""
    with tempfile.TemporaryDirectory(prefix="rowwise-start-", ignore_cleanup_errors=True) as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        words = [*overrides, f"run_dir={quoted(str(run))}", "tracker=none"]
        with log.open("wb") as said:
            began = time.time()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rowwise.launch.start", *words],
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
            )
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not _size(metrics) and time.time() - began < GIVE_UP_SECONDS:
            time.sleep(POLL_SECONDS)
        first = metrics.stat().st_mtime if _size(metrics) else time.time()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code:
            sys.stderr.write(log.read_text(errors="replace")[-3000:])
            return code, {}
        ended, seconds, before = time.time(), {}, began
        for what, name in MARKS:
            at = first if name == "metrics.jsonl" else (run / name).stat().st_mtime
            seconds[what] = at - before
            before = at
        seconds["in all, to the first step"] = first - began
        seconds["the step under way, a checkpoint, leaving"] = ended - first
        return 0, seconds


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
