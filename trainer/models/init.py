"""Initial parameters, the same numbers on every layout.

Element i of the parameter `name` is element i of the stream (seed, name): a shard draws its own rows and no others. What
each parameter begins as, its spec says (`kernels.spec`; of our decoder: `trainer.models.specs`).
"""

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from rowwise.kernels.philox import normal, random_words, stream_key
from rowwise.kernels.spec import Constant, Normal, Specs, Uniform
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.huggingface import rows_from


def random_rows(specs: Specs, seed: int) -> Callable[[str, Tensor, int, int], None]:
    """Makes a function that fills rows of a parameter; see `parallel.shard.materialize`. It raises ValueError for one whose
    spec does not say what it begins as."""

    def fill_(name: str, rows: Tensor, start: int, size: int) -> None:
        key, first = stream_key(seed, name), start * math.prod(rows.shape[1:])
        match specs[name].init:
            case Constant(value):
                rows.fill_(value)
            case Uniform(bound):
                words = random_words(key, first, rows.numel(), rows.device)
                rows.copy_((words.double() * 2.0**-31 - 1).mul_(bound).view_as(rows))
            case Normal(std):
                rows.copy_(normal(key, first, rows.numel(), rows.device).view_as(rows) * std)
            case None:
                raise ValueError(f"the spec of {name} does not say what it begins as; give it init=")

    return fill_


def model_rows(model: ModelConfig, seed: int) -> Callable[[str, Tensor, int, int], None]:
    """Returns what fills rows of a parameter of the model itself, as numbers, before the first step: drawn, or read in its folder."""
    source, own = model.init_from, parameter_specs(model)
    return random_rows(own, seed) if source is None else rows_from(Path(source).expanduser(), own)
