"""What was watched of the runs: spikes and what was done about them, a profile by kind, and the slowest rank."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rowwise.launch.pages.draw import line_of, name_of
from rowwise.launch.pages.markup import Marked, duration, paragraph, percent, table
from rowwise.launch.pages.records import Run

SPIKE_FIELDS = frozenset({"spike_score", "spike_step"})
FIELDS = frozenset({"slowest_rank", "slowest_rank_seconds", "median_rank_seconds"})
FOLDER = "profile"  # of trainer.profile, which waits for torch
MOST_SPIKES = 30  # of a run, in the table
DONE = {"skip": "its update was not made", "rollback": "its update was not made: there was nothing to go back to yet"}


def spikes(runs: Sequence[Run]) -> list[str]:
    """Returns a table of the spikes of all runs, the last of each."""
    rows = [row for run in runs for row in list(spikes_of(run))[-MOST_SPIKES:]]
    head = ["run", "step", "spreads above the steps before", "what was done"]
    return [table("Steps far above those before", head, rows)] if rows else []


def spikes_of(run: Run) -> Iterator[list[Any]]:
    """Yields a row for each spike."""
    scores, came_from = (_by_step(run, name) for name in ("spike_score", "spike_step"))
    for step, score in scores.items():
        told = f"{score:.1f}" if np.isfinite(score) else "no number"
        if step in came_from:
            yield [name_of(run), f"{came_from[step]:,.0f}", told, f"the run went back to step {step - 1:,.0f}"]
        else:
            yield [name_of(run), f"{step:,.0f}", told, DONE.get(run.setting("on_spike"), "recorded")]


def _by_step(run: Run, name: str) -> dict[int, float]:
    curve = run.curves.get(name)
    return {} if curve is None else dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


def show(runs: Sequence[Run]) -> list[str]:
    """Returns the parts of a profiled step of every rank that has them, and a line of each run's slowest rank."""
    blocks = [table_of_parts(runs)]
    blocks += [paragraph(Marked(line_of(run, runs, told))) for run in runs if (told := slowest_of(run)) is not None]
    return [block for block in blocks if block]


def table_of_parts(runs: Sequence[Run]) -> str:
    """Returns the table of profiled parts, empty where no run was profiled. Raises ValueError for a file that is none."""
    found = [
        (run, document)
        for run in runs
        for file in sorted((run.folder / FOLDER).glob("rank-*.json"), key=lambda file: int(file.stem.split("-")[1]))
        if (document := run.document(f"{FOLDER}/{file.name}")) is not None
    ]
    if not found:
        return ""
    kinds = list(found[0][1]["parts"])
    rows = [
        [
            name_of(run), document["rank"], "{} to {}".format(*document["steps"]), duration(document["seconds"]),
            *(_share(document["parts"].get(kind, 0.0), document["seconds"]) for kind in kinds),
        ]
        for run, document in found
    ]  # fmt: skip
    return table("Where the time of profiled steps goes", ["run", "rank", "steps", "a step", *kinds], rows)


def _share(part: float, whole: float) -> str:
    return f"{duration(part)}, {percent(part / whole if whole else 0.0)}"


def slowest_of(run: Run) -> str | None:
    """Says which rank was the slowest most often, and what it cost on the mean of those steps."""
    ranks, own, median = (run.curve(name) for name in ("slowest_rank", "slowest_rank_seconds", "median_rank_seconds"))
    if ranks is None or own is None or median is None:
        return None
    (rank, times), *_ = Counter(ranks.values.tolist()).most_common(1)
    here = ranks.values == rank
    seconds, usual = float(own.values[here].mean()), float(median.values[here].mean())
    return (
        f"rank {rank:.0f} was the slowest in {times} of {len(ranks.steps)} steps looked at: {duration(seconds)} of its own a "
        f"step, {duration(seconds - usual)} more than the median rank"
    )
