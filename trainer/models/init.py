"""Initial parameters, the same numbers on every layout.

Every matrix is normal with standard deviation `init_std`; those that write into the residual stream (`wo`, `w2`)
are smaller by sqrt(2 layers), so that its variance does not grow with depth (Radford et al., *GPT-2*). Norms are 1, and
what they add is 0. A stable embedding is uniform in +-sqrt(6 / (vocab_size + dim)) (Glorot & Bengio).
Element i of the parameter `name` is element i of the stream (seed, name): a shard draws its own rows and no others.
"""

import math
from collections.abc import Callable

from torch import Tensor

from rowwise.kernels.philox import normal, random_words, stream_key
from rowwise.trainer.models.decoder import ModelConfig


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Of the matrix `name`."""
    writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    return config.init_std / math.sqrt(2 * config.layers) if writes_residual else config.init_std


def random_rows(config: ModelConfig, seed: int) -> Callable[[str, Tensor, int, int], None]:
    """A function that fills rows of a parameter; see `parallel.shard.materialize`."""

    def fill_(name: str, rows: Tensor, start: int, size: int) -> None:
        if rows.ndim == 1:
            rows.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        cols = rows.size(1)
        if config.stable_embedding and name == "embed.weight":
            words = random_words(stream_key(seed, name), start * cols, rows.numel(), rows.device)
            half = math.sqrt(6 / (config.vocab_size + config.dim))
            rows.copy_((words.double() * 2.0**-31 - 1).mul_(half).view_as(rows))
            return
        numbers = normal(stream_key(seed, name), start * cols, rows.numel(), rows.device)
        rows.copy_(numbers.view_as(rows) * standard_deviation(name, config))

    return fill_
