"""train.log: everything that a run says, with times, over all its starts. Needs no torch."""

import contextlib
import time
from pathlib import Path

TRAIN_LOG = "train.log"
RANK_LOGS = "log"


def keep_said(run_dir: Path, text: str) -> None:
    """Appends `text` to the log of the run in `run_dir`, its first line behind the time, the others below it. A disk that is full
    ends no run because of it: what the run writes beside it says so."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    said = f"\n{' ' * len(stamp)}  ".join(text.splitlines())
    with contextlib.suppress(OSError), (run_dir / TRAIN_LOG).open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"{stamp}  {said}\n")


def logs_with_words(run_dir: Path) -> list[Path]:
    """Returns the logs of a run that are not empty: its own, and those of ranks."""
    found = [run_dir / TRAIN_LOG, *sorted((run_dir / RANK_LOGS).glob("rank-*.log"))]
    return [path for path in found if path.is_file() and path.stat().st_size]


def rank_log(run_dir: Path, rank: int) -> Path:
    """Returns where the words of a rank other than 0 go."""
    return run_dir / RANK_LOGS / f"rank-{rank}.log"
