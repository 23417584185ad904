"""Searches layouts and memory options for the fastest run that fits its devices.

What the user gave stays. Of the rest every combination is counted roughly (`plan.combinations`); those that can fit are forecast in
the order of their rough times, until none that is left can be faster.
"""

from collections.abc import Set
from dataclasses import dataclass, field, replace

from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.changes import changes_of
from rowwise.trainer.plan.combinations import Candidate, Search
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.forecast import Forecast, forecast

FORECASTS, OTHERS = 64, 5


@dataclass(frozen=True)
class Found:
    """A run that was forecast."""

    words: tuple[str, ...]
    forecast: Forecast


@dataclass(frozen=True)
class Fit:
    """What a search found. `best`: the fastest that fits, None where nothing does, and `words`: its overrides; `others`: the next
    ones; `changes`: what single options would change of the best; `closest`: what lacks least where nothing fits; `tried`: how
    many combinations there were; `refused`: why the last of them could not be."""

    best: Forecast | None
    words: tuple[str, ...]
    others: list[Found]
    closest: Found | None
    tried: int
    refused: str = ""
    changes: list[tuple[str, Forecast]] = field(default_factory=list)


def find_fit(config: TrainConfig, world_size: int, device: Device, given: Set[str]) -> Fit:
    """Searches. `config`: not checked yet; `given`: the keys that stay as they are. Raises ValueError for what no layout makes
    possible."""
    config = check_numbers(config)
    search = Search(config, world_size, device, given)
    candidates = sorted(search.candidates(), key=lambda one: one.seconds)
    limit = min(device.memory, config.memory.limit or device.memory)
    hopeful = [one for one in candidates if one.size <= limit and one.beside]
    fitting, closest = _tried(hopeful, device)
    if not fitting:  # what is counted roughly may fit less than it seems
        fitting, closest = _tried(sorted(candidates, key=lambda one: one.size), device)
    fitting.sort(key=_order)
    if not fitting:
        return Fit(None, (), [], closest, len(candidates), search.refused)
    best = replace(fitting[0], forecast=forecast(fitting[0].forecast.config, device))
    return Fit(
        best.forecast, best.words, fitting[1 : OTHERS + 1], None, len(candidates), changes=changes_of(best.forecast)
    )


def _tried(candidates: list[Candidate], device: Device) -> tuple[list[Found], Found | None]:
    """Forecasts the first of these until none that is left can be among the fastest: what fits, and of the rest what lacks least."""
    fitting, closest = list[Found](), None
    for one in candidates[:FORECASTS]:
        slowest = sorted(found.forecast.seconds.step for found in fitting)[OTHERS] if len(fitting) > OTHERS else None
        if slowest is not None and one.seconds > 1.1 * slowest:
            break
        found = Found(one.words, forecast(one.config, device, ends=True))
        if found.forecast.room.fits:
            fitting.append(found)
        elif closest is None or found.forecast.room.needed < closest.forecast.room.needed:
            closest = found
    return fitting, closest


def _order(found: Found) -> tuple[float, int]:
    """Faster ones first; of those that differ in nothing that an estimate can tell, the one that needs less."""
    return float(f"{found.forecast.seconds.step:.3g}"), found.forecast.room.needed


def check_numbers(config: TrainConfig) -> TrainConfig:
    """Checks what no layout changes: on one worker, in one piece. Raises ValueError."""
    plain = replace(config.parallel, **{key: getattr(type(config.parallel)(), key) for key in LAYOUT})
    one = replace(config.batch, global_size=config.batch.micro_size)
    check(replace(config, parallel=replace(plain, shard=1), batch=one), 1)
    return config


LAYOUT = ("replicate", "shard", "pipeline", "pipeline_schedule", "virtual_stages", "ulysses", "ring", "ring_order",
          "pipeline_unit", "pipeline_gather", "pipeline_memory", "pipeline_costs", "pipeline_trace", "post_validation")  # fmt: skip
