"""How the runs and sweeps below a folder stand, from what they have on disk: their locks, outcomes, and the ends of their records.

Thousands of runs are read in seconds: of each the settings, the end of metrics.jsonl, and the sizes of its files. Needs no torch.
"""

import contextlib
import csv
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rowwise.launch.outcome import OUTCOME, Outcome, read_outcome
from rowwise.trainer.files import from_json
from rowwise.trainer.keys import without_password
from rowwise.trainer.lock import JOB, LOCK, is_held
from rowwise.trainer.manifest import complete_checkpoints, step_of
from rowwise.trainer.metrics import last_number, last_records, number
from rowwise.trainer.next_steps import code_in, to_begin_again, to_go_on
from rowwise.trainer.pace import WINDOW, Pace, recent_pace

PLAN, ASKED, TABLE, COMMAND, WATCHED = "sweep.json", "asked.json", "sweep.csv", "command.txt", ".watched"
_OF_A_RUN = {"metrics.jsonl", OUTCOME, JOB, WATCHED}
SILENT_SECONDS, SILENT_STEPS = 120.0, 20.0  # without a sign of life, after which a run that holds its lock may hang


@dataclass(frozen=True)
class Standing:
    """A run, or a sweep (`trials`: how many it has), as it stands. What is not known is None; `bytes` is on disk.

    `state`: running, silent (it holds its lock, and has made no step for long), complete, stopped, killed (it left no word), failed,
    refused, pruned, not begun, or unreadable. `tokens_per_second` is of a worker. `goes_on`: the command that continues it;
    of a trial its sweep's does."""

    folder: Path
    state: str
    reason: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    bytes: int = 0
    goes_on: str | None = None
    trials: int | None = None
    sweep: Path | None = None


def standings(folders: Sequence[Path]) -> Iterator[Standing]:
    """Yields every run and sweep below `folders`, by name, a sweep before its trials."""
    for folder in folders:
        yield from _below(folder, set())


def _below(folder: Path, met: set[tuple[int, int]]) -> Iterator[Standing]:
    try:
        facts = folder.stat()
        if (facts.st_dev, facts.st_ino) in met:  # a link that leads back
            return
        met.add((facts.st_dev, facts.st_ino))
        names = {entry.name: entry.is_dir() for entry in os.scandir(folder)}
    except OSError as error:
        yield Standing(folder, "unreadable", error.strerror)
        return
    if PLAN in names:
        trials = [t for name in _in_order(names) if names[name] for t in _below(folder / name, met) if t.trials is None]
        trials = _as_the_search_says(folder, [replace(trial, sweep=folder, goes_on=None) for trial in trials])
        yield of_sweep(folder, trials)
        yield from trials
    elif _OF_A_RUN & names.keys():
        yield of_run(folder)
    else:
        for name in _in_order(names):
            if names[name] and not name.startswith("."):
                yield from _below(folder / name, met)


def _in_order(names: Sequence[str] | dict[str, bool]) -> list[str]:
    """By their words and numbers: trial-2 before trial-10."""
    return sorted(
        names, key=lambda name: [(not part.isdecimal(), part.zfill(20)) for part in re.findall(r"\d+|\D+", name)]
    )


def of_run(folder: Path, now: float | None = None) -> Standing:
    """Says how the run in `folder` stands. Whatever is damaged there, it says so and raises nothing."""
    try:
        return _of_run(folder, time.time() if now is None else now)
    except Exception as error:  # of a stranger's files, in a list of thousands
        return Standing(folder, "unreadable", str(error).splitlines()[0] if str(error) else type(error).__name__)


def _of_run(folder: Path, now: float) -> Standing:
    records = last_records(folder, WINDOW)
    settings = _settings(folder)
    pace, last = Pace(records), records[-1] if records else {}
    step, steps = last.get("step"), _whole(rb"^steps: (\d+)\s*$", settings)
    saved = _newest_saved(folder)
    state, reason = state_of(
        is_held(folder), read_outcome(folder), step, steps, saved, now - _last_sign(folder), pace.seconds_for(1) or 0.0
    )
    under_way = state in ("running", "silent")
    ahead = steps - step if under_way and steps and step else None
    evaluated = next((record["eval_loss"] for record in reversed(records) if "eval_loss" in record), None)
    if (
        evaluated is None
        and records
        and not re.search(rb"^eval:\s*\n(?:  .*\n)*?  every: 0\s*$", settings, re.MULTILINE)
    ):
        evaluated = last_number(folder, "eval_loss")
    return Standing(
        folder=folder,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        loss=number(last.get("loss")),
        eval_loss=number(evaluated),
        tokens_per_second=pace.mean("tokens_per_second"),
        seconds_left=None if ahead is None else recent_pace(folder).seconds_for(ahead),
        bytes=_bytes(folder),
        goes_on=None if under_way else _command(folder, state, steps, saved, code_in(settings)),
    )


def state_of(
    held: bool,
    outcome: Outcome | None,
    step: int | None,
    steps: int | None,
    saved: int | None,
    quiet_seconds: float,
    step_seconds: float,
) -> tuple[str, str | None]:
    """Returns the state of a run, and why: by its lock and its last sign of life while it is under way, then by its outcome, and
    where nobody wrote one (workers that torchrun started, or all were killed) by how far it came. `saved`: its newest checkpoint."""
    if held:
        if quiet_seconds > max(SILENT_SECONDS, SILENT_STEPS * step_seconds):
            return "silent", f"no sign of life for {_duration(quiet_seconds)}"
        return "running", None
    if outcome is not None:
        return outcome.state, None if outcome.state in ("complete", "stopped") else outcome.reason
    if step is None and saved is None:
        return "not begun", None
    if saved is not None and steps is not None and saved >= steps:
        return "complete", None
    if saved == step:
        return "stopped", None
    return "killed", f"it left no word after step {step or 0}; {f'saved at {saved}' if saved else 'nothing was saved'}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def of_sweep(folder: Path, trials: Sequence[Standing]) -> Standing:
    """Says how a sweep stands, from its trials: `step` of `steps` are those that have ended. Where nobody wrote how many there are
    to be, none is complete."""
    under_way = [trial for trial in trials if trial.state in ("running", "silent")]
    ended = [trial for trial in trials if trial.state in ("complete", "pruned", "failed", "refused")]
    planned, goal = _asked(folder)
    complete = planned is not None and len(ended) >= planned > 0
    state = "running" if under_way or is_held(folder) else "complete" if complete else "stopped"
    counts = [f"{n} {name}" for name in dict.fromkeys(trial.state for trial in trials)
              if (n := sum(trial.state == name for trial in trials))]  # fmt: skip
    measured = [(value, n) for n, trial in enumerate(trials) if (value := getattr(trial, goal)) is not None]
    best = trials[min(measured)[1]] if measured else None
    lefts = [trial.seconds_left for trial in under_way if trial.seconds_left is not None]
    command = _said(folder / COMMAND)
    return Standing(
        folder,
        state,
        ", ".join(counts) + (f"; best {best.folder.name}" if best else "") or None,
        step=len(ended),
        steps=planned,
        loss=best.loss if best and goal == "loss" else None,
        eval_loss=best.eval_loss if best else None,
        seconds_left=max(lefts, default=None) if len(ended) + len(under_way) == planned else None,
        bytes=sum(trial.bytes for trial in trials) + _bytes(folder, deep=False),
        goes_on=None if state in ("running", "complete") else command,
        trials=len(trials),
    )


def _asked(folder: Path) -> tuple[int | None, Literal["loss", "eval_loss"]]:
    """How many trials a sweep was asked for, None where nobody wrote it, and by what they are compared."""
    for name in (ASKED, PLAN):  # of a grid the plan tells its trials too
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            told = from_json((folder / name).read_bytes())
            trials, goal = told.get("trials"), told.get("goal")
            if isinstance(trials, list | int):
                return trials if isinstance(trials, int) else len(trials), "loss" if goal == "loss" else "eval_loss"
    return None, "eval_loss"


def _as_the_search_says(folder: Path, trials: list[Standing]) -> list[Standing]:
    """Trials that the search itself ended look stopped; its table knows."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError, csv.Error, UnicodeError), (folder / TABLE).open(newline="") as file:
        told = {f"trial-{row.get('trial')}": row.get("state") or "" for row in csv.DictReader(file)}
    pruned = {name for name, state in told.items() if state == "pruned"}
    return [
        replace(trial, state="pruned") if trial.state == "stopped" and trial.folder.name in pruned else trial
        for trial in trials
    ]


def _command(folder: Path, state: str, steps: int | None, saved: int | None, own: str | None) -> str | None:
    """What goes on with a run that is not under way; None where only its own command line begins it."""
    if saved is not None:
        return to_go_on(folder, 2 * steps if state == "complete" and steps else None, own)
    if (folder / "config.yaml").is_file():
        return to_begin_again(folder, own)
    return None


def _settings(folder: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (folder / "config.yaml").read_bytes()
    return b""


def _whole(pattern: bytes, text: bytes) -> int | None:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1][:18]) if found else None


def _said(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return without_password(path.read_text(errors="replace").strip()) or None
    return None


def _newest_saved(folder: Path) -> int | None:
    """The step of the newest checkpoint; its files are not looked into."""
    with contextlib.suppress(ValueError, OSError):
        return next((step_of(path) for path in complete_checkpoints(folder / "checkpoints")), None)
    return None


def _last_sign(folder: Path) -> float:
    """When the run last wrote something of its own."""
    found = [0.0]
    for name in ("metrics.jsonl", "train.log", JOB, LOCK):
        with contextlib.suppress(OSError):
            found.append((folder / name).stat().st_mtime)
    return max(found)


def _bytes(folder: Path, deep: bool = True) -> int:
    """What the files take on disk; links count for nothing."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    total += _bytes(Path(entry.path)) if deep else 0
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total
