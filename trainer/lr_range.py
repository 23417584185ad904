"""The learning-rate range test (Smith, *Cyclical Learning Rates*; Smith & Topin, *Super-Convergence*): while `schedule=lr_range`
raises the rate, the loss falls, then blows up, and between the two stands the rate to train with.

Losses are smoothed by an exponential moving average without its bias at the start. The test is over once the smoothed loss has
given back a quarter of what it had won (a tenth of the first loss where that is more), or is no number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowwise.trainer.metrics import read_metrics

KEPT = 0.8  # of the average, at each step
FIRST = 5  # steps, of which an average says too little

Point = tuple[
    float, float
]  # a learning rate, and the loss of the step that was made with it: infinite where it was no number


@dataclass(frozen=True)
class Finding:
    """What a test showed: the rates where the smoothed loss was lowest, and where it blew up (None: it did not)."""

    lowest: float
    blow_up: float | None

    @property
    def suggested(self) -> float:
        """The rate to train with: a third of where the loss was lowest, of which a long run has a margin."""
        return float(f"{self.lowest / 3:.1e}")


class RangeTest:
    """The points of a test under way; those before a resume are read from the run's records, alike on every rank."""

    def __init__(self, run_dir: Path, step: int):
        self._points = points_of([record for record in read_metrics(run_dir) if record["step"] <= step])

    def add(self, record: dict[str, Any]) -> None:
        """A step that was made."""
        self._points += points_of([record])

    @property
    def over(self) -> bool:
        return is_over([loss for _, loss in self._points])

    def told(self) -> str:
        """The verdict so far."""
        return verdict(self._points)


def points_of(records: Sequence[dict[str, Any]]) -> list[Point]:
    """The points in records of metrics.jsonl. A step without tokens says nothing, nor one that a smaller loss scale may mend."""
    points: list[Point] = []
    for record in records:
        if record["grad_norm"] is not None and record["loss"] is not None:
            points.append((record["lr"], record["loss"]))
        elif record["grad_norm"] is None and record.get("loss_scale", 1) <= 1:
            points.append((record["lr"], math.inf))
    return points


def smoothed(losses: Sequence[float]) -> list[float]:
    """s_t = sum_k 0.8^(t-k) l_k / sum_k 0.8^(t-k)."""
    total, weight, means = 0.0, 0.0, []
    for loss in losses:
        total, weight = KEPT * total + loss, KEPT * weight + 1
        means.append(total / weight)
    return means


def is_over(losses: Sequence[float]) -> bool:
    """Whether the loss has blown up by its last entry."""
    if not losses or not math.isfinite(losses[-1]):
        return bool(losses)
    means = smoothed(losses)
    best = min(means)
    return means[-1] > best + max(0.25 * (means[0] - best), 0.1 * abs(means[0]))


def find(points: Sequence[Point]) -> Finding | None:
    """What a test shows. None: the loss fell at no rate."""
    known = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    means = smoothed([loss for _, loss in known])
    lowest = min(range(len(means)), key=means.__getitem__, default=0)
    if lowest < FIRST:
        return None
    return Finding(known[lowest][0], points[-1][0] if is_over([loss for _, loss in points]) else None)


def verdict(points: Sequence[Point]) -> str:
    """What a test says, in a line."""
    if not points:
        return "range test: no step had a loss"
    finding, first, last = find(points), points[0][0], points[-1][0]
    if finding is None:
        return f"range test: the loss fell at no rate from {first:.3g} to {last:.3g}; begin lower, with schedule.start"
    end = f"blew up at {finding.blow_up:.2g}" if finding.blow_up else f"had not blown up at {last:.2g}: raise optim.lr"
    return (
        f"range test: train with optim.lr={finding.suggested:g}, a third of {finding.lowest:.2g}, where the loss was lowest; "
        f"it {end}"
    )
