"""The page that a run leaves when it ends: report.html, with the reason on top. A run is over before it is made, and nothing
that goes wrong with it is more than a line of warning.

It is made in a process of its own, without torch, in 2 seconds of one core (after a million steps 15). A signal ends the wait for
it, and so do PATIENCE_SECONDS.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rowwise.launch.outcome import Ended, Outcome, State, cause_of, read_outcome, write_outcome
from rowwise.trainer.files import DiskFull
from rowwise.trainer.metrics import last_step
from rowwise.trainer.starts import Report
from rowwise.trainer.stop import answering, hearing

if TYPE_CHECKING:
    from rowwise.trainer.config import TrainConfig

PATIENCE_SECONDS = 30.0
AT_ONCE = "interrupted by Ctrl-C, without saving"
WRITER = (sys.executable, "-P", "-m", "rowwise.launch.report")


def leave_report(run_dir: Path, asked: Report, state: State) -> None:
    """Writes report.html into the folder of a run that has ended as `state`, where `asked` has it so. Call it in the main
    thread, for signals."""
    if asked == "never" or state == "refused" or (asked == "failed" and state != "failed") or not run_dir.is_dir():
        return
    why = _written(run_dir.absolute())
    if why is not None:
        again = f"`rowwise report run={run_dir}` makes it"
        print(f"warning: no report.html: {why}; {again}", file=sys.stderr, flush=True)


def _written(run_dir: Path) -> str | None:
    """Why it is not; None where it is."""
    try:
        with tempfile.TemporaryFile() as said:  # not a pipe, which holds it up once it is full
            return _written_by([*WRITER, f"run={run_dir}"], said)
    except OSError as error:
        return f"{error.strerror}"


def _written_by(command: list[str], said: IO[bytes]) -> str | None:
    writer = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with hearing(lambda number, frame: writer.kill()), answering(lambda number, left: None):
        try:
            code = writer.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            writer.kill()  # and not waited for: one that hangs in the file system does not end of it
            return f"it took more than {PATIENCE_SECONDS:g} seconds"
    if code < 0:
        return "it was interrupted"
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()
    return None if code == 0 else ([line for line in lines if line] or [f"it ended with {code}"])[-1]


@contextlib.contextmanager
def end_told(config: "TrainConfig") -> Iterator[None]:
    """Writes down how a run ends that no agent of ours sees to the end, as the agent does: on rank 0. Enter it where the
    folder is held, and call `leave_report_as_told` when it is no more."""
    run_dir, outcome = Path(config.run_dir), Outcome("stopped", "asked to stop")
    try:
        yield
        if last_step(run_dir) >= config.steps:
            outcome = Outcome("complete")
    except KeyboardInterrupt:
        outcome = Outcome("stopped", AT_ONCE)
        raise
    except BaseException as error:
        told = str(error) if isinstance(error, Ended) else cause_of(f"{type(error).__name__}: {error}")
        outcome = Outcome("failed", told)
        raise
    finally:
        with contextlib.suppress(DiskFull, OSError):  # which most likely is the reason, and is told
            write_outcome(run_dir, replace(outcome, step=last_step(run_dir)))


def leave_report_as_told(config: "TrainConfig") -> None:
    """Leaves the report of a run whose end is written down; not where Ctrl-C asked for the end at once."""
    outcome = read_outcome(Path(config.run_dir))
    if outcome is not None and outcome.reason != AT_ONCE:
        leave_report(Path(config.run_dir), config.report, outcome.state)
