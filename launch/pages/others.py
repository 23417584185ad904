"""Whatever else the records hold, so that nothing recorded is invisible."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rowwise.launch.pages.draw import COLORS, color, curves, dress, line_of, picture, shares, title_of
from rowwise.launch.pages.markup import figure, grid, short, text
from rowwise.launch.pages.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = len(COLORS)  # lines that can be told apart


def show(runs: Sequence[Run], shown: frozenset[str]) -> list[str]:
    """Returns a panel for each field that is not `shown`; of a table of numbers one for each run."""
    names = dict.fromkeys(name for run in runs for name in (*run.curves, *run.tables) if name not in shown)
    return grid(
        piece
        for name in names
        for piece in (
            curves(runs, name, name, "as recorded", decades=1000),
            *(of_table(run, name, runs) for run in runs if name in run.tables),
        )
    )


def of_table(run: Run, name: str, runs: Sequence[Run]) -> str:
    """Returns a line for each of a few entries; of many the mean, and a band from the least to the largest."""
    kept, (step, last) = run.tables[name].kept, run.tables[name].last
    keys = list(dict.fromkeys(key for _, entry in kept for key in entry))
    steps = np.array([at for at, _ in kept])
    values = np.array([[entry.get(key, np.nan) for key in keys] for _, entry in kept])
    few = len(keys) <= FEW
    if few:
        caption = shares([(key, COLORS[i], short(last[key])) for i, key in enumerate(keys) if key in last])
    else:
        ends = np.array(list(last.values()))
        caption = text(f"{len(last)} entries at step {step}: mean {short(ends.mean())}, "
                       f"from {short(ends.min())} to {short(ends.max())}")  # fmt: skip

    def paint(axes: "Axes") -> None:
        marker = "o" if len(steps) == 1 else ""
        if few:
            for i in range(len(keys)):
                axes.plot(steps, values[:, i], color=COLORS[i], linewidth=1.4, marker=marker)
        else:
            fill = color(run.order)
            axes.fill_between(steps, np.nanmin(values, 1), np.nanmax(values, 1), color=fill, alpha=0.25, linewidth=0)
            axes.plot(steps, np.nanmean(values, 1), color=fill, linewidth=1.6, marker=marker)
        dress(axes, "as recorded" if few else "mean, least and largest")

    label = f"{name} of {run.label} over steps, {len(keys)} entries"
    return figure(title_of(name, run, runs), line_of(run, runs, caption), picture(label, paint))
