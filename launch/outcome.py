"""outcome.json: how the run in a folder ended. Written by what started its workers, taken away by the next run there."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rowwise.trainer.files import write_whole

OUTCOME = "outcome.json"
State = Literal["complete", "stopped", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and where it stood. `reason` begins with "out of memory" or "not a number" where that is why."""

    state: State
    reason: str | None = None
    step: int = 0

    @property
    def has_cause(self) -> bool:
        """Whether the reason is one of the run itself, and not that some other worker is gone."""
        return (self.reason or "").startswith(("out of memory", "not a number"))


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    write_whole(run_dir / OUTCOME, json.dumps(asdict(outcome)) + "\n")


def read_outcome(run_dir: Path) -> Outcome | None:
    """None while the run has not ended."""
    path = run_dir / OUTCOME
    return Outcome(**json.loads(path.read_text())) if path.exists() else None


def last_refusal(logs: Iterable[Path]) -> str:
    """The reason that stands last in these logs."""
    lines = [line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines()]
    said = [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
    return said[-1] if said else "what it printed says why"


def clear_outcome(run_dir: Path) -> None:
    """A run begins there."""
    (run_dir / OUTCOME).unlink(missing_ok=True)
