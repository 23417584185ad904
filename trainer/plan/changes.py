"""What single options would change of a run's forecast."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rowwise.optim.quantized import AdamW8bitConfig
from rowwise.trainer.check import check_layout
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.combinations import COMPRESS, PLACES, RECOMPUTE, with_words
from rowwise.trainer.plan.forecast import Forecast, forecast


def changes_of(best: Forecast) -> list[tuple[str, Forecast]]:
    """Forecasts what single options would change, where they can be."""
    found = tried_changes(best)
    if best.config.optim.name == "adamw":
        own = best.config.optim
        eight = AdamW8bitConfig(lr=own.lr, weight_decay=own.weight_decay, param_dtype=own.param_dtype)
        found.append(("optim=adamw8bit", forecast(replace(best.config, optim=eight), best.device)))
    return found


def tried_changes(before: Forecast) -> list[tuple[str, Forecast]]:
    """Forecasts each of `single_changes`, where it can be, with its words."""
    found = []
    for words in single_changes(before.config, before.device.cuda):
        try:
            changed = check_layout(with_words(before.config, words), before.config.parallel.world_size)
        except ValueError:
            continue
        told = " ".join(f"{key}={str(value).lower()}" for key, value in words.items())
        found.append((told, forecast(changed, before.device, ends=True)))
    return found


def single_changes(config: TrainConfig, gpu: bool) -> Iterator[dict[str, Any]]:
    """Yields each option that saves memory or gives it back, by itself."""
    for recompute in RECOMPUTE:
        if recompute != config.memory.recompute:
            yield {"memory.recompute": recompute}
    for key, values in (("compress", COMPRESS), ("offload_activations", PLACES)):
        for value in values:
            if value != getattr(config.memory, key):
                yield {f"memory.{key}": value}
    if gpu:
        yield from moves(config)
    yield {"memory.fused_loss": not config.memory.fused_loss}
    for zero in (1, 2, 3):
        if zero != config.parallel.zero and config.parallel.state_degree > 1:
            yield {"parallel.zero": zero}
    if config.batch.micro_size % 2 == 0:
        yield {"batch.micro_size": config.batch.micro_size // 2}
    yield {"batch.micro_size": config.batch.micro_size * 2}


def moves(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Yields each move of a rank's rows between a GPU and its host: of states, and of parameters, which follow them."""
    states, params = config.memory.offload_states, config.memory.offload_params
    if params != "none":
        yield {"memory.offload_params": "none"}
    elif states != "none":
        yield {"memory.offload_states": "none"}
    if params == "none" and config.parallel.zero == 3:
        yield {"memory.offload_states": "cpu" if states == "none" else states, "memory.offload_params": "cpu"}
    if states == "none":
        yield {"memory.offload_states": "cpu"}
