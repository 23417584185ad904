"""Initial parameters, the same numbers on every layout.

Element i of the parameter `name` is element i of the stream (seed, name): a shard draws its own rows and no others. What
each parameter begins as, its spec says (`kernels.spec`; of our decoder: `trainer.models.specs`).
"""

import math
from collections.abc import Callable

from torch import Tensor

from rowwise.kernels.philox import normal, random_words, stream_key
from rowwise.kernels.spec import Constant, Normal, Specs, Uniform


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
