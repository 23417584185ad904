"""What a script of DeepSpeed had set otherwise than the run that goes on from its checkpoint: the curve would bend there."""

import math
from collections.abc import Iterator
from typing import Any

from rowwise.kernels.spec import Specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.convert.foreign import Foreign, Group, as_written_by_deepspeed
from rowwise.trainer.convert.names import theirs_by_ours
from rowwise.trainer.models.decoder import parameter_specs

Pair = tuple[str, Any, Any]  # key, there, here


def differences(foreign: Foreign, config: TrainConfig) -> list[str]:
    """Returns what differs, in a line; nothing where all that the checkpoint says is the same. Raises ValueError for other
    parameters than the run has."""
    specs = parameter_specs(config.model)
    ours = {theirs: name for name, theirs in theirs_by_ours(specs, foreign.parameters, foreign.place).items()}
    with as_written_by_deepspeed(foreign.place):
        pairs = [*_of_run(foreign, config)]
        for group in foreign.groups:
            pairs += _of_group(group, {ours[name] for name in group.names if name in ours}, config, specs)
    told = [
        f"{key}={_short(there)} there and {_short(here)} here" for key, there, here in pairs if _differ(there, here)
    ]
    return [f"warning: the script had other settings: {', '.join(dict.fromkeys(told))}"] if told else []


def _of_group(group: Group, names: set[str], config: TrainConfig, specs: Specs) -> Iterator[Pair]:
    said, optim = group.settings, config.optim
    for key in ("betas", "eps"):
        if key in said and hasattr(optim, key):
            yield f"optim.{key}", said[key], getattr(optim, key)
    for vector in {specs[name].role == "vector" for name in names} if "weight_decay" in said else ():
        of = "optim.weight_decay of vectors" if vector else "optim.weight_decay"
        yield of, said["weight_decay"], 0.0 if vector else optim.weight_decay


def _of_run(foreign: Foreign, config: TrainConfig) -> Iterator[Pair]:
    counts = foreign.counts
    if isinstance(foreign.clip_norm, int | float):
        yield "clip_norm", foreign.clip_norm, config.clip_norm
    if counts.steps and counts.samples != counts.steps * config.batch.global_size:
        yield "batch.global_size", counts.samples / counts.steps, config.batch.global_size
    rates = [group.settings["lr"] for group in foreign.groups if "lr" in group.settings]
    # Where a script sets its rate before a step, the last step's is there; where it does so after one, the next's.
    if rates and not any(math.isclose(rates[0], _rate(config, step)) for step in (counts.steps - 1, counts.steps)):
        yield "the learning rate", rates[0], _rate(config, counts.steps)


def _rate(config: TrainConfig, step: int) -> float:
    return config.optim.lr * config.schedule.factor(min(max(step, 0), config.steps), config.steps)


def _differ(there: Any, here: Any) -> bool:
    if isinstance(there, list | tuple):
        return list(there) != list(here)
    return there != here


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
