"""The learning-rate range test (Smith, *Cyclical Learning Rates*; Smith & Topin, *Super-Convergence*): while `schedule=lr_range`
raises the rate, the loss falls, then blows up, and between the two stands the rate to train with.

Losses are smoothed by an exponential moving average without its bias at the start. The test is over once the smoothed loss has
given back a quarter of what it had won (a tenth of the first loss where that is more), or is no number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.trainer.metrics import number

KEPT = 0.8  # of the average, at each step
FIRST = 5  # steps, of which an average says too little

RANGE_TEST: Refusals = (
    Refusal(
        ("schedule.name", "parallel.post_validation"),
        lambda run: run.schedule.name == "lr_range" and run.parallel.post_validation,
        "schedule=lr_range with parallel.post_validation: a test ends after a step whose loss blew up, when the next has "
        "begun; give parallel.post_validation=false",
    ),
)

Point = tuple[float, float]  # a learning rate, and the loss of its step: infinite where that was no number


@dataclass(frozen=True)
class Finding:
    """What a test showed: the rates where the smoothed loss was lowest, and where it blew up (None: it did not)."""

    lowest: float
    blow_up: float | None

    @property
    def suggested(self) -> float:
        """The rate to train with: a third of where the loss was lowest, of which a long run has a margin."""
        return float(f"{self.lowest / 3:.1e}")


@dataclass
class Average:
    """The smoothed loss s_t = sum_k 0.8^(t-k) l_k / sum_k 0.8^(t-k), one loss after the other: all `means` so far."""

    means: list[float] = field(default_factory=list)
    lowest: float = math.inf
    _total: float = 0.0
    _weight: float = 0.0

    def add(self, loss: float) -> None:
        self._total, self._weight = KEPT * self._total + loss, KEPT * self._weight + 1
        self.means.append(self._total / self._weight)
        self.lowest = min(self.lowest, self.means[-1])

    @property
    def blown_up(self) -> bool:
        """Whether the loss has blown up, by the last that was added."""
        if not self.means or not math.isfinite(self.means[-1]):
            return bool(self.means)
        first, last = self.means[0], self.means[-1]
        return last > self.lowest + max(0.25 * (first - self.lowest), 0.1 * abs(first))


def averaged(losses: Sequence[float]) -> Average:
    average = Average()
    for loss in losses:
        average.add(loss)
    return average


class RangeTest:
    """The points of a test under way, `before` a resume and after."""

    def __init__(self, before: Sequence[Point]):
        self._points = list(before)
        self._average = averaged([loss for _, loss in before])

    def add(self, record: dict[str, Any]) -> bool:
        """Takes a step that was made. Returns whether the test is over."""
        for point in points_of([record]):
            self._points.append(point)
            self._average.add(point[1])
        return self.over

    @property
    def over(self) -> bool:
        return self._average.blown_up

    def told(self) -> str:
        """Returns the verdict of the test so far."""
        return verdict(self._points)


def points_of(records: Sequence[dict[str, Any]]) -> list[Point]:
    """Returns the points in records of metrics.jsonl. A step without tokens says nothing, nor one that a smaller loss scale may
    mend."""
    points: list[Point] = []
    for record in records:
        lr, loss, norm = (number(record.get(key)) for key in ("lr", "loss", "grad_norm"))
        if lr is None:  # a record that was damaged
            continue
        if norm is not None and loss is not None:
            points.append((lr, loss))
        elif norm is None and (number(record.get("loss_scale")) or 1) <= 1:
            points.append((lr, math.inf))
    return points


def find(points: Sequence[Point]) -> Finding | None:
    """Returns what a test shows. None: the loss fell at no rate."""
    known = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    average = averaged([loss for _, loss in known])
    lowest = average.means.index(average.lowest) if known else 0
    if lowest < FIRST:
        return None
    return Finding(known[lowest][0], points[-1][0] if averaged([loss for _, loss in points]).blown_up else None)


def verdict(points: Sequence[Point]) -> str:
    """Returns what a test says, in a line."""
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
