"""Learning-rate schedules: pure functions of the step that return a factor of `optim.lr`.

Steps count from 0: step t uses factor(t). Every schedule warms up linearly over `warmup_steps`, so that step
`warmup_steps` is the first at full rate; step 0 has the factor 1 / (warmup_steps + 1), never 0.
The fields of each choice are a dataclass of their own, so that a field of another schedule is an error.
"""

import math
from dataclasses import dataclass
from typing import Literal


def warmup(step: int, warmup_steps: int) -> float:
    """Linear warm-up: min(1, (t + 1) / (w + 1))."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(progress: float, floor: float) -> float:
    """Half a cosine from 1 to `floor` while progress goes from 0 to 1 (Loshchilov & Hutter, SGDR)."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def linear(progress: float, floor: float) -> float:
    """A straight line from 1 to `floor` while progress goes from 0 to 1."""
    return 1 - (1 - floor) * min(1.0, max(0.0, progress))


def inverse_sqrt_decay(progress: float, floor: float) -> float:
    """1 - sqrt(progress), the cool-down of Haegele et al. (*Scaling Laws Beyond Fixed Training Durations*), to `floor`."""
    return floor + (1 - floor) * (1 - math.sqrt(min(1.0, max(0.0, progress))))


DECAYS = {"linear": linear, "cosine": cosine, "sqrt": inverse_sqrt_decay}
DecayName = Literal["linear", "cosine", "sqrt"]


@dataclass(frozen=True)
class Constant:
    """Full rate after the warm-up."""

    name: Literal["constant"] = "constant"
    warmup_steps: int = 0

    def factor(self, step: int, steps: int) -> float:
        return warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Warm up, then half a cosine to `floor` at the last step."""

    name: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    floor: float = 0.1

    def factor(self, step: int, steps: int) -> float:
        return warmup(step, self.warmup_steps) * cosine(_progress(step, self.warmup_steps, steps), self.floor)


@dataclass(frozen=True)
class Linear:
    """Warm up, then a straight line to `floor` at the last step."""

    name: Literal["linear"] = "linear"
    warmup_steps: int = 0
    floor: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        return warmup(step, self.warmup_steps) * linear(_progress(step, self.warmup_steps, steps), self.floor)


@dataclass(frozen=True)
class OneCycle:
    """One-cycle (Smith & Topin, *Super-Convergence*): cosine from 1/start_div up to 1 over the first `rise` of the
    steps, then cosine down to 1 / (start_div * end_div)."""

    name: Literal["one_cycle"] = "one_cycle"
    rise: float = 0.3
    start_div: float = 25.0
    end_div: float = 1e4

    def factor(self, step: int, steps: int) -> float:
        top = self.rise * (steps - 1)
        if step < top:
            return cosine(1 - step / top, 1 / self.start_div)
        return cosine((step - top) / max(1.0, steps - 1 - top), 1 / (self.start_div * self.end_div))


@dataclass(frozen=True)
class Wsd:
    """Warm-up, stable, decay (Hu et al., *MiniCPM*): full rate until the last `decay_steps`, which fall to `floor`."""

    name: Literal["wsd"] = "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0
    decay: DecayName = "sqrt"
    floor: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        full = warmup(step, self.warmup_steps)
        if self.decay_steps == 0:
            return full
        return full * DECAYS[self.decay]((step - (steps - 1 - self.decay_steps)) / self.decay_steps, self.floor)


@dataclass(frozen=True)
class Infinite:
    """The infinite schedule (Ibrahim et al., *Simple and Scalable Strategies to Continually Pre-train*; Singh et al.,
    *Beyond Cosine Decay*): warm up, cool over `cooldown_steps` to the constant `constant`, hold for ever, and, once
    `anneal_at` is given, anneal over `anneal_steps` to `floor`.

    A checkpoint of the constant part can be annealed (resume it with `anneal_at`) and trained on as well.
    `rewarm_at` starts the whole schedule again at that step, for continual pre-training on new data (Gupta et al.,
    *How to (re)warm your model?*): the factor climbs from where it stood.
    """

    name: Literal["infinite"] = "infinite"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    cooldown: DecayName = "cosine"
    constant: float = 0.5
    anneal_at: int | None = None
    anneal_steps: int = 0
    floor: float = 0.0
    rewarm_at: int | None = None

    def factor(self, step: int, steps: int) -> float:
        held = self._rewarmed(step)
        if self.anneal_at is None or step < self.anneal_at:
            return held
        progress = (step - self.anneal_at + 1) / max(1, self.anneal_steps)
        return held * linear(progress, self.floor)

    def _rewarmed(self, step: int) -> float:
        if self.rewarm_at is None or step < self.rewarm_at:
            return self._held(step)
        since, before = step - self.rewarm_at, self._held(self.rewarm_at)
        if since < self.warmup_steps:
            return before + (1 - before) * warmup(since, self.warmup_steps)
        return self._held(since)

    def _held(self, step: int) -> float:
        cooled = (
            (step - self.warmup_steps) / self.cooldown_steps
            if self.cooldown_steps
            else float(step >= self.warmup_steps)
        )
        return warmup(step, self.warmup_steps) * DECAYS[self.cooldown](cooled, self.constant)


ScheduleConfig = Constant | Cosine | Linear | OneCycle | Wsd | Infinite


def check_schedule(config: ScheduleConfig, steps: int) -> None:
    """Refuses what a schedule of `steps` steps cannot mean. Raises ValueError."""
    for key, value in vars(config).items():
        if key.endswith("_steps") and value < 0:
            raise ValueError(f"schedule.{key}={value}: a number of steps is at least 0")
        if key in ("floor", "constant") and not 0 <= value <= 1:
            raise ValueError(f"schedule.{key}={value}: it is a share of optim.lr, from 0 to 1")
    phases = getattr(config, "warmup_steps", 0) + getattr(config, "decay_steps", 0)
    if phases > steps:
        raise ValueError(
            f"schedule={config.name}: warm-up and decay take {phases} steps and the run has {steps}; "
            "shorten schedule.warmup_steps or schedule.decay_steps, or raise steps"
        )
    if isinstance(config, OneCycle) and (not 0 < config.rise < 1 or config.start_div < 1 or config.end_div < 1):
        raise ValueError("schedule=one_cycle: rise lies between 0 and 1, and start_div and end_div are at least 1")
    if isinstance(config, Infinite):
        _check_infinite(config)


def _check_infinite(config: Infinite) -> None:
    if config.anneal_at is None and config.anneal_steps:
        raise ValueError(
            "schedule.anneal_steps is given without schedule.anneal_at, the step at which annealing starts"
        )
    if config.anneal_at is not None and config.anneal_steps < 1:
        raise ValueError("schedule.anneal_at is given: schedule.anneal_steps must be at least 1")
    if config.rewarm_at is not None and config.anneal_at is not None and config.anneal_at < config.rewarm_at:
        raise ValueError(
            f"schedule.anneal_at={config.anneal_at} comes before schedule.rewarm_at={config.rewarm_at}: "
            "re-warming after annealing is a new run; resume its checkpoint under another name"
        )


def _progress(step: int, warmup_steps: int, steps: int) -> float:
    return (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
