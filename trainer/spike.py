"""Spikes: steps whose loss or gradient norm is far above that of the steps before, and what is done about them.

    record      the update is made, and the record of the step says `spike`
    skip        the update is not made, as after an overflow of fp16: weights, their states and masks that would grow by its
                gradient stay (masks that follow from weights alone change when they are due); the step counts, so the learning
                rate's schedule and the place in the data go on (OLMo 2's skip-step optimizers)
    rollback    the run goes back to the newest checkpoint that `checkpoint.every` made, on disk, and past all data that it
                has read since (Chowdhery et al., *PaLM*, section 5.1); where there is none yet, it skips; or records, where the
                update was made in the backward (optim.in_backward)

A number x of a step is `threshold` spreads above the centre of those of the last `window` steps:

    rule=median    (x - median) / (1.4826 MAD)    Hampel's identifier: a spike in the window moves neither
    rule=mean      (x - mean) / std               as OLMo-core's optimizers that skip steps

What is far below is no spike. Only numbers that all ranks have already go into it, so all decide alike and nothing is sent. It
asks first once `window` is half full, with the step at hand, as OLMo-core does, and holds at least 20 steps, where that asks
from 2 on: a spread of so few says little. What it remembers is in `TrainState`, so a run that
is stopped, or rolled back, decides as one that is not: data order is a function of the step and of what was rolled back.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.optim.lengths import read_length
from rowwise.trainer.manifest import complete_checkpoints, step_of

OnSpike = Literal["record", "skip", "rollback"]

FEWEST = 20  # steps, of which a spread says enough
LARGEST_WINDOW = 1_000
FLAT = 1e-3  # of the median: a spread below it is one of a loss that does not move


class TooManySpikes(Exception):
    """Skips or rollbacks have not helped."""


@dataclass(frozen=True)
class SpikeConfig:
    """What is far above the steps before. `rule`: spreads are `median` absolute deviations from the median, or standard
    deviations from the `mean`. `window`: how many of the last steps they are of. `threshold`: so many spreads are far.
    `most`: so many skips one after another, or rollbacks in all, and the run ends."""

    rule: MayChange[Literal["median", "mean"]] = "median"
    window: MayChange[int] = 128
    threshold: MayChange[float] = 6.0
    most: MayChange[int] = 10


@dataclass(frozen=True)
class Rollback:
    """A way back from the spike at `step`, whose score is None where it was no number, back to step `to`. The samples from number
    `first` up to `after` of the order have no step in the run."""

    step: int
    to: int
    first: int
    after: int
    score: float | None


@dataclass(frozen=True)
class Spikes:
    """What is known of the steps so far: the `window`, how many of the last were skipped one after another, and rollbacks."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: int = 0
    rollbacks: list[Rollback] = field(default_factory=list)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Spikes":
        return cls(**{**tree, "rollbacks": [Rollback(**one) for one in tree["rollbacks"]]})


SPIKES: Refusals = (
    Refusal(
        ("spike.window",),
        lambda run: not FEWEST <= run.spike.window <= LARGEST_WINDOW,
        f"spike.window={{spike.window}}: steps that a step is held against, {FEWEST} to {LARGEST_WINDOW:,}",
    ),
    Refusal(
        ("spike.threshold", "spike.most"),
        lambda run: run.spike.threshold <= 0 or run.spike.most < 1,
        "spike.threshold={spike.threshold} spike.most={spike.most}: spreads above the middle, above 0 (6 say), and how "
        "many skips in a row or rollbacks are made, at least 1",
    ),
    Refusal(
        ("on_spike", "optim.in_backward"),
        lambda run: run.on_spike == "skip" and run.optim.in_backward,
        "on_spike=skip with optim.in_backward: parameters have changed when the norm is known; give on_spike=rollback, "
        "which goes back to a checkpoint, or on_spike=record",
    ),
    Refusal(
        ("on_spike", "schedule.name"),
        lambda run: run.on_spike != "record" and run.schedule.name == "lr_range",
        "on_spike={on_spike} with schedule=lr_range: a test ends where the loss blows up; give on_spike=record",
    ),
    Refusal(
        ("on_spike", "data.when_short"),
        lambda run: run.on_spike == "rollback" and getattr(run.data, "when_short", "repeat") != "repeat",
        "on_spike=rollback with data.when_short={data.when_short}: a rollback passes over data, and a source may then end before "
        "the run; give on_spike=skip, or data.when_short=repeat",
    ),
    Refusal(
        ("on_spike", "checkpoint.every", "steps"),
        lambda run: run.on_spike == "rollback" and _no_way_back(run),
        lambda run: (
            f"on_spike=rollback with checkpoint.every={run.checkpoint.every}: {_no_way_back(run)}; give "
            "checkpoint.every=10%, say, or on_spike=skip"
        ),
    ),
)


def _no_way_back(run: Any) -> str | None:
    """Why a run, by how often it saves a checkpoint, has none to go back to."""
    interval = read_length("checkpoint.every", run.checkpoint.every)
    if interval.unit == "time":
        return "a clock would say where it goes back to"
    if interval.amount == 0:
        return "there is nothing to go back to"
    if run.known_steps and run.length.in_steps(interval) >= run.steps:
        return f"there is nothing to go back to before the end of the run, steps={run.steps}"
    return None


def score(before: list[float], x: float, rule: str) -> float:
    """Says how many spreads `x` is above those `before`, below them where it is negative; infinite where it is no number."""
    if not math.isfinite(x):
        return math.inf
    if rule == "mean":
        spread, away = statistics.stdev(before), x - statistics.fmean(before)
    else:
        middle = statistics.median(before)
        spread, away = 1.4826 * statistics.median(abs(one - middle) for one in before), x - middle
        spread = max(spread, FLAT * abs(middle))
    return away / spread if spread > 0 else math.copysign(math.inf, away) if away else 0.0


def spike_of(seen: Spikes, loss: float, norm: float, config: SpikeConfig) -> float | None:
    """Returns the score of a step that is a spike, the larger of its loss's and its norm's; None for any other. A step without valid
    tokens has no loss, and is none."""
    if not math.isfinite(norm):
        return math.inf
    if math.isnan(loss) or len(seen.losses) + 1 < max(FEWEST, config.window // 2):
        return None
    found = max(score(seen.losses, loss, config.rule), score(seen.norms, norm, config.rule))
    return found if found > config.threshold else None


def after_step(seen: Spikes, loss: float, norm: float, skipped: bool, config: SpikeConfig) -> Spikes:
    """Returns what is known once the step is over. A spike stands in the window as every step does: what is high for long is no
    spike. Raises TooManySpikes."""
    in_a_row = seen.skipped + 1 if skipped else 0
    if in_a_row > config.most:
        raise TooManySpikes(
            f"spikes: {config.most} steps in a row were skipped (spike.most), and the next has a loss of {loss:.4g} and a "
            f"gradient norm of {norm:.4g}; a smaller optim.lr, a larger spike.threshold or on_spike=record may help"
        )
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return replace(seen, skipped=in_a_row)
    kept = slice(-config.window, None)
    return replace(seen, losses=[*seen.losses, loss][kept], norms=[*seen.norms, norm][kept], skipped=in_a_row)


def newest_anchor(checkpoints: Path, is_anchor: Callable[[int], bool]) -> int | None:
    """Returns the step of the newest checkpoint that `checkpoint.every` made: one of a stop is none, or a run that was stopped would
    go back to another step than one that was not."""
    return next(filter(is_anchor, map(step_of, complete_checkpoints(checkpoints))), None)


def require_few(seen: Spikes, step: int, config: SpikeConfig) -> None:
    """Refuses, before a rollback at `step`, more than a few. Raises TooManySpikes."""
    if len(seen.rollbacks) >= config.most:
        raise TooManySpikes(
            f"spikes: step {step} is one, and the run was rolled back {config.most} times (spike.most); a smaller optim.lr, a "
            "larger spike.threshold or on_spike=record may help"
        )


def spike_record(seen: Spikes, step: int, found: float | None, done: str) -> dict[str, Any]:
    """Returns what `spike` says in the record of a step: what was `done` about it, with its score; or that the run was rolled back
    to the step before this one. Nothing, where there was none."""
    if found is not None:
        return {"spike": done, "spike_score": found}
    last = seen.rollbacks[-1] if seen.rollbacks else None
    if last is None or last.to != step - 1:
        return {}
    return {"spike": "rolled back", "spike_score": last.score, "spike_step": last.step}


def told_of(back: Rollback) -> str:
    """Returns a line of a rollback."""
    found = math.inf if back.score is None else back.score
    return f"{in_words(back.step, found)}: rolled back to step {back.to}, and past samples {back.first:,} to {back.after - 1:,}"


def in_words(step: int, found: float) -> str:
    """Says what a spike is."""
    away = f"{found:.1f} spreads above the steps before" if math.isfinite(found) else "no number"
    return f"step {step} is a spike ({away})"
