"""What the runs learn: losses, learning rate, gradient norm, and the loss scale of fp16."""

import math
from collections.abc import Sequence

from rowwise.launch.pages.draw import curves
from rowwise.launch.pages.markup import grid, loss, paragraph, rate, short, whole
from rowwise.launch.pages.records import Run

FIELDS = frozenset({"loss", "eval_loss", "lr", "grad_norm", "loss_scale", "skipped_steps"})


def show(runs: Sequence[Run]) -> list[str]:
    figures = [
        curves(runs, "loss", "Training loss", "nats per token", form=loss, smoothed=True, ticks=fine),
        curves(runs, "eval_loss", "Held-out loss", "nats per token", form=loss, ticks=fine),
        curves(runs, "lr", "Learning rate", "by the schedule", form=rate, decades=math.inf),
        curves(runs, "grad_norm", "Gradient norm", "before clipping", smoothed=True),
        curves(runs, "loss_scale", "Loss scale of fp16", "factor", form=whole, decades=8),
        curves(runs, "skipped_steps", "Steps passed over", "so far", form=whole),
    ]
    mute = [run for run in runs if run.last_step and run.curve("loss") is None]
    return [
        *resumes(runs),
        *(paragraph(f"{run.label}: no step has a loss yet; all {len(run.steps):,} {_why(run)}.") for run in mute),
        *grid(figures),
    ]


def resumes(runs: Sequence[Run]) -> list[str]:
    """Returns what the dotted lines are; nothing where there are none."""
    told = [
        f"{run.label} after step {' and '.join(f'{step:,}' for step in run.resumed)}" for run in runs if run.resumed
    ]
    return [paragraph(f"Resumed: {'; '.join(told)} (a dotted line in each picture over steps).")] if told else []


def fine(number: float) -> str:
    """Returns a loss beside an axis, where it needs no zeros at its end."""
    return short(number, 4)


def _why(run: Run) -> str:
    """Of steps without a loss: one that overflowed has no gradient either."""
    return "overflowed" if run.curve("grad_norm") is None else "overflowed or had no valid token"
