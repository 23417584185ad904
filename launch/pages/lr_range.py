"""The learning-rate range test: the loss over the rate, and the rate to train with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rowwise.launch.pages.draw import color, dress, line_of, picture, title_of
from rowwise.launch.pages.markup import figure, grid, rate, text
from rowwise.launch.pages.records import Curve, Run
from rowwise.trainer.lr_range import averaged, find, points_of, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIELDS: frozenset[str] = frozenset()  # the loss and the rate stand in "Learning" too


def show(runs: Sequence[Run]) -> list[str]:
    """Returns a figure of every run that is a test; nothing of others."""
    return grid(range_figure(run, runs) for run in runs if run.setting("schedule.name") == "lr_range")


def range_figure(run: Run, runs: Sequence[Run]) -> str:
    """Returns the loss, thin, and its average, thick, up to where it blew up; a line at the rate that is suggested."""
    points = points_of(_records(run))
    if len(points) < 2:
        return ""
    words, finding = verdict(points), find(points)
    spoken = f"Learning-rate range test of {run.label}. {words}"

    def paint(axes: "Axes") -> None:
        shown = [(rate, loss) for rate, loss in points if np.isfinite(loss)]
        rates, losses = [rate for rate, _ in shown], [loss for _, loss in shown]
        axes.plot(rates, losses, linewidth=0.7, alpha=0.3, color=color(run.order))
        axes.plot(rates, averaged(losses).means, linewidth=1.8, color=color(run.order))
        dress(axes, "nats per token", x="learning rate")
        axes.set_xscale("log")
        if finding is not None:
            axes.axvline(finding.suggested, color="#333333", linewidth=1, dashes=(4, 2))
            axes.annotate(
                f"optim.lr={rate(finding.suggested)}", (finding.suggested, 0.97), xycoords=axes.get_xaxis_transform(),
                xytext=(-4, 0), textcoords="offset points", ha="right", va="top", color="#333333",
            )  # fmt: skip

    return figure(
        title_of("Loss over the learning rate", run, runs), line_of(run, runs, text(words)), picture(spoken, paint)
    )


def _records(run: Run) -> list[dict[str, float | None]]:
    """What of metrics.jsonl the test is read from, null where it is no number."""
    fields = {
        name: curve for name in ("lr", "loss", "grad_norm", "loss_scale") if (curve := run.curves.get(name)) is not None
    }
    steps = run.steps

    def values(curve: Curve) -> list[float | None]:
        there = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
        return [None if np.isnan(value := there.get(step, np.nan)) else value for step in steps.tolist()]

    columns = {name: values(curve) for name, curve in fields.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
