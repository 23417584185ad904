"""outcome.json: how the run in a folder ended. Written by what started its workers, or by rank 0 where that
is not ours; taken away by the next run there."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from rowwise.trainer.files import to_json, write_whole

OUTCOME = "outcome.json"
_ROOM, _ROOM_BYTES = ".outcome.room", 4096
State = Literal["complete", "stopped", "refused", "failed"]


class Ended(Exception):
    """The end of a run that one line tells, instead of a traceback: its state, the exit code, and the line."""

    state: State
    code: int


class Refused(Ended):
    state, code = "refused", 2


class Failed(Ended):
    state, code = "failed", 1


@dataclass(frozen=True)
class Failure:
    """The end of a worker that failed: its exit code, below 0 a signal's, and what it, or who watched it, said of it."""

    exitcode: int
    message: str


class WorkersFailed(Exception):
    """Some worker of a run ended otherwise than with 0."""

    def __init__(self, failures: list[Failure]):
        super().__init__("; ".join(failure.message for failure in failures))
        self.failures = failures


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and where it stood. `reason` begins with "out of memory", "not a number" or "disk full"
    where that is why."""

    state: State
    reason: str | None = None
    step: int = 0

    @property
    def has_cause(self) -> bool:
        """Whether the reason is one of the run itself, and not that some other worker is gone."""
        return (self.reason or "").startswith(("out of memory", "not a number", "disk full"))


def cause_of(text: str) -> str:
    """Says what an exception of that text means for a run: it has no memory, or its numbers are none."""
    if any(word in text for word in ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError")):
        return f"out of memory: {text}"
    if "FloatingPointError" in text:
        return f"not a number: {text.removeprefix('FloatingPointError: ')}"
    return text


_OUTCOME = TypeAdapter(Outcome)


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Writes how the run ended. Raises DiskFull where not even the room that was kept for it is left."""
    give_room(run_dir)
    write_whole(run_dir / OUTCOME, to_json(asdict(outcome)) + "\n")


def read_outcome(run_dir: Path) -> Outcome | None:
    """Reads how the run ended; None while it has not. A file that is damaged says so instead."""
    path = run_dir / OUTCOME
    try:
        return _OUTCOME.validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return Outcome("failed", f"{path} is damaged ({str(error).splitlines()[0]})")


def last_refusal(log: Path) -> str:
    """Returns the reason that stands last in what an agent said."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
    return said[-1] if said else "what it printed says why"


def clear_outcome(run_dir: Path) -> None:
    """Removes the outcome, since a run begins there."""
    (run_dir / OUTCOME).unlink(missing_ok=True)


def keep_room(run_dir: Path) -> None:
    """Takes the room that an outcome will need, should the disk be full by then. Raises DiskFull."""
    write_whole(run_dir / _ROOM, " " * _ROOM_BYTES)


def give_room(run_dir: Path) -> None:
    """Gives it back."""
    (run_dir / _ROOM).unlink(missing_ok=True)
