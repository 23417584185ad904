"""What the runs learn: losses, learning rate, gradient norm, and the loss scale of fp16."""

import math
from collections.abc import Sequence

from rowwise.launch.pages.draw import curves
from rowwise.launch.pages.markup import grid, loss, paragraph, rate, whole
from rowwise.launch.pages.records import Run

FIELDS = frozenset({"loss", "eval_loss", "lr", "grad_norm", "loss_scale", "skipped_steps"})


def show(runs: Sequence[Run]) -> list[str]:
    figures = [
        curves(runs, "loss", "Training loss", "nats per token", form=loss, smoothed=True),
        curves(runs, "eval_loss", "Held-out loss", "nats per token", form=loss),
        curves(runs, "lr", "Learning rate", "by the schedule", form=rate, decades=math.inf),
        curves(runs, "grad_norm", "Gradient norm", "before clipping", smoothed=True),
        curves(runs, "loss_scale", "Loss scale of fp16", "factor", form=whole, decades=8),
        curves(runs, "skipped_steps", "Steps passed over", "so far", form=whole),
    ]
    mute = [run for run in runs if run.last_step and run.curve("loss") is None]
    return [
        *(paragraph(told) for run in runs if (told := resumes(run, runs))),
        *(paragraph(f"{run.label}: no step has a loss yet; all {len(run.steps):,} {_why(run)}.") for run in mute),
        *grid(figures),
    ]


def resumes(run: Run, runs: Sequence[Run]) -> str:
    """What the dotted lines are; nothing where there are none."""
    if not run.resumed:
        return ""
    which = f"{run.label} was" if len(runs) > 1 else "The run was"
    return f"{which} resumed after step {' and '.join(f'{step:,}' for step in run.resumed)}: a dotted line in each picture over steps."


def _why(run: Run) -> str:
    """Of steps without a loss: one that overflowed has no gradient either."""
    return "overflowed" if run.curve("grad_norm") is None else "overflowed or had no valid token"
