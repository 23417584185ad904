"""The trials of a sweep as they stand on disk: their table and their picture."""

import contextlib
import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowwise.launch.compose import key_of
from rowwise.launch.outcome import read_outcome
from rowwise.launch.overrides import quoted
from rowwise.trainer.files import write_whole
from rowwise.trainer.metrics import number, read_metrics
from rowwise.trainer.tracker import Mlflow, TrackerConfig, Trackio, Wandb

LEAVES = "report=failed"  # of hundreds of trials those are looked at one by one


@dataclass(frozen=True)
class Trial:
    """A trial: its number, what sets it apart, its folder, and how it ended where the folder does not tell."""

    number: int
    settings: dict[str, str]
    folder: Path
    state: str | None = None
    reason: str | None = None

    @property
    def said(self) -> str:
        """The settings of the trial in a line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def tell(trials: Sequence[Trial], folder: Path, goal: str) -> None:
    """Writes the table and the picture of a sweep into its folder, and says how it went."""
    if not trials:
        print("asked to stop before the first trial; the same command begins")
        return
    rows = [row_of(trial, goal) for trial in trials]
    write_table(rows, folder / "sweep.csv")
    picture = draw(trials, folder, goal)
    for row, trial in zip(rows, trials, strict=True):
        value = "" if row[goal] is None else f"{goal} {row[goal]:.4f}"
        print(f"trial-{row['trial']}  {row['state']:<10} {value:<18} {trial.said}  {row['reason'] or ''}".rstrip())
    print(f"written: {folder / 'sweep.csv'}, {picture}")


def trial_words(own: Sequence[str], tracker: TrackerConfig, sweep: str, number: int, folder: Path) -> list[str]:
    """Returns the command line of a trial: in its own folder, with a report only where it fails, unless `own` says otherwise, and in
    one group with the others where a tracker has groups."""
    words = [*own, f"name={quoted(f'{sweep}-{number}')}", f"run_dir={quoted(str(folder))}"]
    words += [] if any(key_of(word) == "report" for word in own) else [LEAVES]
    grouped = isinstance(tracker, Wandb | Mlflow | Trackio) and tracker.group is None
    return [*words, f"tracker.group={quoted(sweep)}"] if grouped else words


def row_of(trial: Trial, goal: str) -> dict[str, Any]:
    """Returns a trial's line of the table. What was not measured, or is no number, is None."""
    records = records_of(trial.folder)
    last = records[-1] if records else {}
    evaluations = values_of(records, "eval_loss")
    speeds = values_of(records, "tokens_per_second")
    state, reason = _ended(trial, records, goal)
    return {
        "trial": trial.number,
        "state": state,
        **trial.settings,
        "step": last.get("step"),
        "tokens": number(last.get("tokens")),
        "loss": number(last.get("loss")),
        "eval_loss": evaluations[-1] if evaluations else None,
        "best_eval_loss": min(evaluations, default=None),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "seconds": sum(sum(values_of(records, f"{part}_seconds")) for part in ("step", "eval", "save")),
        "reason": reason,
        "folder": str(trial.folder),
    }


def _ended(trial: Trial, records: Sequence[dict[str, Any]], goal: str) -> tuple[str, str | None]:
    """The state of a trial and the reason for it."""
    if trial.state is not None:
        return trial.state, trial.reason
    outcome = read_outcome(trial.folder)
    if outcome is None:
        return "running" if records else "not begun", trial.reason
    if outcome.state == "complete" and (lack := result(trial.folder, goal)[1]) is not None:
        return "failed", lack
    return outcome.state, trial.reason or outcome.reason


def result(folder: Path, goal: str) -> tuple[float | None, str | None]:
    """Returns the `goal` that a trial which is complete ended with, or why it has none."""
    measured = [record for record in records_of(folder) if goal in record]
    if not measured:
        return None, f"it has no {goal}"
    value, step = number(measured[-1][goal]), measured[-1]["step"]
    return value, None if value is not None else f"not a number: {goal} of step {step}"


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of a trial; none where they cannot be read, which ends no sweep."""
    with contextlib.suppress(OSError):
        return read_metrics(folder)
    return []


def values_of(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Returns the values that are numbers."""
    return [value for record in records if (value := number(record.get(key))) is not None]


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the table, a line a trial."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def draw(trials: Sequence[Trial], folder: Path, goal: str) -> Path:
    """Writes sweep.png of the trials that have measured something, and returns where it is."""
    from rowwise.launch.sweep.picture import Result  # matplotlib, which no trial waits for
    from rowwise.launch.sweep.picture import draw as draw_results

    path = folder / "sweep.png"
    measured = [(trial, points) for trial in trials if (points := curve(trial.folder, goal))]
    draw_results(
        [
            Result(trial.number, trial.settings, points, _ended(trial, records_of(trial.folder), goal)[0] == "complete")
            for trial, points in measured
        ],
        path,
        goal,
    )
    return path


def curve(folder: Path, goal: str) -> list[tuple[int, float]]:
    """Returns steps and the values of `goal` there."""
    points = [(record["step"], number(record.get(goal))) for record in records_of(folder)]
    return [(step, value) for step, value in points if value is not None]
