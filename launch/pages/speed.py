"""How fast the runs are, and where the time of a step goes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rowwise.launch.pages.draw import (
    COLORS,
    curves,
    dress,
    line_of,
    mark_resumes,
    median_of,
    name_of,
    picture,
    shares,
    title_of,
)
from rowwise.launch.pages.markup import duration, figure, grid, percent, table
from rowwise.launch.pages.records import Run, stretches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIELDS = frozenset({"tokens_per_second", "mfu", "step_seconds", "data_seconds", "eval_seconds", "save_seconds"})
PARTS = {"compute and communication": COLORS[0], "data": COLORS[5], "evaluation": COLORS[2], "save": COLORS[3]}


def show(runs: Sequence[Run]) -> list[str]:
    timed = [run for run in runs if run.curve("step_seconds") is not None]
    rows = [[name_of(run), *_row(run)] for run in timed]
    head = ["run", "all steps", "a step", *PARTS]
    return [
        *grid(
            [
                curves(
                    runs,
                    "tokens_per_second",
                    "Throughput",
                    "tokens per second per worker",
                    tell=median_of,
                    smoothed=True,
                ),
                curves(
                    runs, "mfu", "Model FLOPs utilization", "of the device's peak", percent, median_of, smoothed=True
                ),
                *(step_time(run, runs) for run in timed),
            ]
        ),
        *([table("Where the time of a step goes", head, rows)] if timed else []),
    ]


def seconds(run: Run) -> dict[str, np.ndarray]:
    """Returns the seconds of every step, by part. `step_seconds` ends before evaluation and save begin, and holds the wait for
    data."""
    data = run.on_steps("data_seconds")
    rest = np.maximum(run.on_steps("step_seconds") - data, 0)
    return dict(zip(PARTS, [rest, data, run.on_steps("eval_seconds"), run.on_steps("save_seconds")], strict=True))


def step_time(run: Run, runs: Sequence[Run]) -> str:
    """Draws the time of a step: means over stretches of steps, one part on the other."""
    parts = seconds(run)
    edges, heights = stretches(run.steps, list(parts.values()))
    whole = sum(part.sum() for part in parts.values())
    legend = shares([(name, PARTS[name], percent(part.sum() / whole)) for name, part in parts.items() if part.any()])

    def paint(axes: "Axes") -> None:
        # The last stretch has a right edge too.
        axes.stackplot(edges, [np.append(h, h[-1]) for h in heights], colors=list(PARTS.values()), step="post")
        axes.set_xlim(edges[0], edges[-1])
        mark_resumes(axes, run)
        axes.set_ylim(0, 1.06 * np.sum(heights, axis=0).max() or 1)
        dress(axes, "seconds a step")

    spoken = ", ".join(f"{name} {percent(part.sum() / whole)}" for name, part in parts.items())
    label = f"Time of a step of {run.label}, in parts: {spoken}"
    return figure(title_of("Time of a step", run, runs), line_of(run, runs, legend), picture(label, paint))


def _row(run: Run) -> list[str]:
    parts, steps = [part.sum() for part in seconds(run).values()], len(run.steps)
    whole = sum(parts)
    return [
        duration(whole),
        duration(whole / steps),
        *(f"{duration(part / steps)}, {percent(part / whole)}" for part in parts),
    ]
