"""The curves that learning-rate schedules are made of, and how long their phases are: pure functions of numbers."""

import math
from typing import Literal


def warmup(step: int, warmup_steps: int) -> float:
    """Warms up linearly: min(1, (t + 1) / (w + 1))."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def climb(before: float, step: int, warmup_steps: int) -> float:
    """Warms up a second time, linearly, from `before` to 1."""
    return before + (1 - before) * warmup(step, warmup_steps)


def cosine(progress: float, floor: float) -> float:
    """Follows half a cosine from 1 to `floor` while progress goes from 0 to 1 (Loshchilov & Hutter, SGDR)."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _within(progress)))


def linear(progress: float, floor: float) -> float:
    """Follows a straight line from 1 to `floor` while progress goes from 0 to 1."""
    return 1 - (1 - floor) * _within(progress)


def sqrt(progress: float, floor: float) -> float:
    """Follows 1 - sqrt(progress), the cool-down of Haegele et al. (*Scaling Laws Beyond Fixed Training Durations*), to `floor`."""
    return floor + (1 - floor) * (1 - math.sqrt(_within(progress)))


def inverse_sqrt(progress: float, floor: float) -> float:
    """Goes h(progress) / h(1) of the way from 1 to `floor`, h(x) = 1 / sqrt(1 + 10 x) - 1: the other cool-down of Ibrahim et al."""
    return 1 - (1 - floor) * (1 / math.sqrt(1 + 10 * _within(progress)) - 1) / (1 / math.sqrt(11) - 1)


def exponential(progress: float, floor: float) -> float:
    """Falls as floor^progress: by equal factors in equal times, the annealing of Ibrahim et al. `floor` is above 0."""
    return floor ** _within(progress)


def _within(progress: float) -> float:
    return min(1.0, max(0.0, progress))


DECAYS = {
    "linear": linear,
    "cosine": cosine,
    "sqrt": sqrt,
    "inverse_sqrt": inverse_sqrt,
    "exponential": exponential,
}
DecayName = Literal["linear", "cosine", "sqrt", "inverse_sqrt", "exponential"]


def length(share: float | None, number: int | None, default: float, steps: int) -> int:
    """Returns the steps of a phase that is given as a `number` of steps, as a `share` of `steps`, or not at all."""
    return number if number is not None else round((default if share is None else share) * steps)
