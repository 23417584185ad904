"""Learning-rate schedules: pure functions of the step that return a factor of `optim.lr`.

Steps count from 0: step t of a run of T steps uses factor(t, T). A schedule warms up linearly over w steps, so that step w is
the first at full rate and step 0 has 1 / (w + 1), never 0; its decays reach their floor at T, the step after the last, as
torch's and transformers' do, so that no step is lost to a rate of 0. How long a phase is can be said as a share of the
run (`warmup=0.02`) or in steps (`warmup_steps=500`), one of the two; in steps it stays where it is when the run is made
longer. The fields of each choice are a dataclass of its own, so that a field of another schedule is an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rowwise.conf.option import MayChange
from rowwise.optim.curves import DECAYS, DecayName, climb, cosine, length, linear, warmup

WARMUP = 0.02  # of the run, where neither a share nor a number of steps is given


@dataclass(frozen=True, kw_only=True)
class WarmedUp:
    """`warmup`: the share of the run that warms up; null: `warmup_steps`, or 0.02. `warmup_steps`: a number of steps or
    tokens in its place."""

    warmup: MayChange[float | None] = None
    warmup_steps: MayChange[int | None] = None

    def warmup_length(self, steps: int) -> int:
        return length(self.warmup, self.warmup_steps, WARMUP, steps)

    def rewarmed(self, once: Callable[[int, int], float], at: int | None, step: int, steps: int) -> float:
        """Returns the factor of `once`(step, steps) in a run that ends at `at` and begins again there, over what is left: its
        warm-up climbs from where the first ended. None: it does not begin again."""
        if at is None:
            return once(step, steps)
        if step < at:
            return once(step, at)
        since, left = step - at, steps - at
        if since < (climbing := self.warmup_length(left)):
            return climb(once(at, at), since, climbing)
        return once(since, left)


@dataclass(frozen=True, kw_only=True)
class Constant(WarmedUp):
    """Full rate after the warm-up."""

    name: MayChange[Literal["constant"]] = "constant"

    def factor(self, step: int, steps: int) -> float:
        return warmup(step, self.warmup_length(steps))


@dataclass(frozen=True, kw_only=True)
class Cosine(WarmedUp):
    """Warm up, then half a cosine to `floor`.

    `floor`: the share of `optim.lr` that it ends at. `rewarm_at`: the step from which a second warm-up climbs from where
    the first ended, and decays over what is left, the run before it being one of that many steps: continual pre-training on
    new data (Gupta et al., *How to (re)warm your model?*)."""

    name: MayChange[Literal["cosine"]] = "cosine"
    floor: MayChange[float] = 0.1
    rewarm_at: MayChange[int | None] = None

    def factor(self, step: int, steps: int) -> float:
        return self.rewarmed(self._once, self.rewarm_at, step, steps)

    def _once(self, step: int, steps: int) -> float:
        start = self.warmup_length(steps)
        return warmup(step, start) * cosine((step - start) / max(1, steps - start), self.floor)


@dataclass(frozen=True, kw_only=True)
class Linear(WarmedUp):
    """Warm up, then a straight line to `floor`. `floor`: the share of `optim.lr` that it ends at."""

    name: MayChange[Literal["linear"]] = "linear"
    floor: MayChange[float] = 0.0

    def factor(self, step: int, steps: int) -> float:
        start = self.warmup_length(steps)
        return warmup(step, start) * linear((step - start) / max(1, steps - start), self.floor)


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """One-cycle (Smith & Topin, *Super-Convergence*): cosine from 1/start_div up to 1 over the first `rise` of the steps,
    then cosine down to 1 / (start_div * end_div).

    `rise`: the share of the steps that climb. `start_div`: `optim.lr` over this is where it starts. `end_div`: and this
    much lower is where it ends. `momentum`: [high, low], the cycle against it: beta1 falls from high to low while the rate
    climbs, and climbs back, along the same cosines (Smith, *A Disciplined Approach*, of SGD's momentum; torch's OneCycleLR,
    of Adam's beta1); null: none."""

    name: MayChange[Literal["one_cycle"]] = "one_cycle"
    rise: MayChange[float] = 0.3
    start_div: MayChange[float] = 25.0
    end_div: MayChange[float] = 1e4
    momentum: MayChange[list[float] | None] = None

    def factor(self, step: int, steps: int) -> float:
        rising, progress = self._phase(step, steps)
        if rising:
            return cosine(1 - progress, 1 / self.start_div)
        return cosine(progress, 1 / (self.start_div * self.end_div))

    def beta1(self, step: int, steps: int) -> float | None:
        """Says how much of the first moment a step keeps; None: what the optimizer has."""
        if self.momentum is None:
            return None
        (high, low), (rising, progress) = self.momentum, self._phase(step, steps)
        return high + (low - high) * cosine(1 - progress if rising else progress, 0.0)

    def _phase(self, step: int, steps: int) -> tuple[bool, float]:
        """Whether the rate climbs, and how much of the climb or of the descent is behind."""
        top = self.rise * (steps - 1)
        return (True, step / top) if step < top else (False, (step - top) / max(1.0, steps - 1 - top))


@dataclass(frozen=True, kw_only=True)
class Wsd(WarmedUp):
    """Warm-up, stable, decay (Hu et al., *MiniCPM*): full rate until the last part of the run, which falls to `floor`.
    `decay_share`: how much of the run that is; null: `decay_steps`, or 0.2 (as Haegele et al.). `decay_steps`: a number of
    steps or tokens in its place. `decay`: its curve. `floor`: the share of `optim.lr` that it ends at."""

    name: MayChange[Literal["wsd"]] = "wsd"
    decay_share: MayChange[float | None] = None
    decay_steps: MayChange[int | None] = None
    decay: MayChange[DecayName] = "sqrt"
    floor: MayChange[float] = 0.0

    def decay_length(self, steps: int) -> int:
        return length(self.decay_share, self.decay_steps, 0.2, steps)

    def factor(self, step: int, steps: int) -> float:
        full, last = warmup(step, self.warmup_length(steps)), self.decay_length(steps)
        if last == 0:
            return full
        return full * DECAYS[self.decay]((step - (steps - last)) / last, self.floor)


@dataclass(frozen=True, kw_only=True)
class Infinite(WarmedUp):
    """The infinite schedule (Ibrahim et al., *Simple and Scalable Strategies to Continually Pre-train*; Singh et al.,
    *Beyond Cosine Decay*): warm up, cool to a constant, hold for ever, and, once `anneal_at` is given, anneal to a floor. A
    checkpoint of the constant part can be annealed (resume it with `anneal_at`) and trained on as well.

    `cooldown_share`: the share of the run that cools; null: `cooldown_steps`, or 0.2. `cooldown_steps`: a number of steps
    or tokens in its place. `cooldown`: its curve. `constant`: the share of `optim.lr` that is held. `anneal_at`: the step
    at which annealing begins; null: it does not. `anneal_steps`: how long it takes; null: what is left of the run.
    `anneal`: its curve. `floor`: the share of `optim.lr` that it ends at. `rewarm_at`: the step at which the whole schedule
    starts again: the factor climbs from where it stood."""

    name: MayChange[Literal["infinite"]] = "infinite"
    cooldown_share: MayChange[float | None] = None
    cooldown_steps: MayChange[int | None] = None
    cooldown: MayChange[DecayName] = "cosine"
    constant: MayChange[float] = 0.5
    anneal_at: MayChange[int | None] = None
    anneal_steps: MayChange[int | None] = None
    anneal: MayChange[DecayName] = "exponential"
    floor: MayChange[float] = 0.1
    rewarm_at: MayChange[int | None] = None

    def cooldown_length(self, steps: int) -> int:
        return length(self.cooldown_share, self.cooldown_steps, 0.2, steps)

    def anneal_length(self, steps: int) -> int:
        assert self.anneal_at is not None
        return steps - self.anneal_at if self.anneal_steps is None else self.anneal_steps

    def factor(self, step: int, steps: int) -> float:
        if self.anneal_at is None or step < self.anneal_at:
            return self._rewarmed(step, steps)
        held = self._rewarmed(self.anneal_at, steps)
        progress = (step - self.anneal_at) / max(1, self.anneal_length(steps))
        return held * DECAYS[self.anneal](
            progress, min(1.0, self.floor / held)
        )  # held is above the floor but in a warm-up

    def _rewarmed(self, step: int, steps: int) -> float:
        return self.rewarmed(self._held, self.rewarm_at, step, steps)

    def _held(self, step: int, steps: int) -> float:
        start, over = self.warmup_length(steps), self.cooldown_length(steps)
        cooled = (step - start) / over if over else float(step >= start)
        return warmup(step, start) * DECAYS[self.cooldown](cooled, self.constant)


@dataclass(frozen=True)
class LrRange:
    """The learning-rate range test (Smith, *Cyclical Learning Rates*): the rate rises to all of `optim.lr` at the last
    step, and the run ends where the loss blows up. `start`: the share of `optim.lr` that it begins with. `growth`: by equal
    factors (`exponential`) or by equal differences (`linear`)."""

    name: MayChange[Literal["lr_range"]] = "lr_range"
    start: MayChange[float] = 1e-5
    growth: MayChange[Literal["exponential", "linear"]] = "exponential"

    def factor(self, step: int, steps: int) -> float:
        progress = step / max(1, steps - 1)
        return (
            self.start ** (1 - progress) if self.growth == "exponential" else self.start + (1 - self.start) * progress
        )


ScheduleConfig = Constant | Cosine | Linear | OneCycle | Wsd | Infinite | LrRange
# A length of a phase: the key of its share of the run, and that of its steps.
PHASES = {"warmup": "warmup_steps", "decay_share": "decay_steps", "cooldown_share": "cooldown_steps"}


def check_schedule(config: ScheduleConfig, steps: int | None) -> None:
    """Refuses what a schedule of `steps` steps cannot mean, or of any number where they are not known yet. Raises ValueError."""
    for key, value in vars(config).items():
        if key.endswith("_steps") and value is not None and value < 0:
            raise ValueError(f"schedule.{key}={value}: a number of steps is at least 0")
        if key in PHASES and value is not None and not 0 <= value <= 1:
            raise ValueError(
                f"schedule.{key}={value}: a share of the run, from 0 to 1; for steps give schedule.{PHASES[key]}"
            )
        if key in ("floor", "constant") and not 0 <= value <= 1:
            raise ValueError(f"schedule.{key}={value}: it is a share of optim.lr, from 0 to 1")
        if key in ("rewarm_at", "anneal_at") and value is not None and not 0 < value < (steps or math.inf):
            raise ValueError(
                f"schedule.{key}={value}: a step after the first, and before the end of the run, steps={steps or 'those of epochs'}"
            )
        if key == "start" and not 0 < value < 1:
            raise ValueError(
                f"schedule.start={value}: the share of optim.lr that the rate rises from, above 0 and below 1"
            )
    for share, number in PHASES.items():
        given = getattr(config, share, None), getattr(config, number, None)
        if None not in given:
            raise ValueError(
                f"schedule.{share}={given[0]} schedule.{number}={given[1]}: a share of the run or a number of steps; give one "
                "of the two"
            )
    if isinstance(config, OneCycle):
        _check_one_cycle(config)
    if isinstance(config, WarmedUp) and steps is not None:
        _check_phases(config, steps)
    if isinstance(config, Wsd):
        _check_shape("decay", config.decay, "floor", config.floor)
    if isinstance(config, Infinite):
        _check_infinite(config)


def _check_one_cycle(config: OneCycle) -> None:
    if not 0 < config.rise < 1 or config.start_div < 1 or config.end_div < 1:
        raise ValueError("schedule=one_cycle: rise lies between 0 and 1, and start_div and end_div are at least 1")
    if config.momentum is not None and not (
        len(config.momentum) == 2 and 1 > config.momentum[0] >= config.momentum[1] >= 0
    ):
        raise ValueError(
            f"schedule.momentum={config.momentum}: two numbers from 0 to below 1, the high one first, such as [0.95, 0.85]; or "
            "null"
        )


def _check_phases(config: Constant | Cosine | Linear | Wsd | Infinite, steps: int) -> None:
    run = steps - (getattr(config, "rewarm_at", None) or 0)
    phases = config.warmup_length(run) + (config.decay_length(run) if isinstance(config, Wsd) else 0)
    if phases > run:
        raise ValueError(
            f"schedule={config.name}: warm-up and decay take {phases} steps and the run has {run}"
            f"{'' if run == steps else ' after schedule.rewarm_at'}; "
            "shorten schedule.warmup_steps or schedule.decay_steps, or raise steps"
        )


def _check_shape(key: str, shape: DecayName, end_key: str, end: float) -> None:
    if shape == "exponential" and end == 0:
        raise ValueError(
            f"schedule.{key}=exponential never reaches schedule.{end_key}=0; give one above 0, or {key}=linear"
        )


def _check_infinite(config: Infinite) -> None:
    _check_shape("cooldown", config.cooldown, "constant", config.constant)
    if config.anneal_at is None:
        if config.anneal_steps is not None:
            raise ValueError(
                "schedule.anneal_steps is given without schedule.anneal_at, the step at which annealing starts"
            )
        return
    _check_shape("anneal", config.anneal, "floor", config.floor)
    if config.anneal_steps == 0:
        raise ValueError("schedule.anneal_steps=0: annealing takes at least 1 step; null is what is left of the run")
    if config.floor > config.constant:
        raise ValueError(
            f"schedule.floor={config.floor} is above schedule.constant={config.constant}, from which annealing goes down; "
            "both are shares of optim.lr"
        )
    if config.rewarm_at is not None and config.anneal_at < config.rewarm_at:
        raise ValueError(
            f"schedule.anneal_at={config.anneal_at} comes before schedule.rewarm_at={config.rewarm_at}: "
            "re-warming after annealing is a new run; resume its checkpoint under another name"
        )
