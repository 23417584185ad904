"""How much of what layers keep is swapped, and how much is made again (Liao et al., *Fuyou*).

Of what layers could keep, A bytes leave the device, and come back, and the rest is made again. A step takes

    T(A) = sum over forward and backward of  max(computation(A), bytes of the link(A) / its bandwidth,
                                                 bytes of the disk(A) / its bandwidth, steps on the host)

Results are kept in the order of operations saved a byte, so that the computation falls ever more slowly as A grows, and bytes grow
with A: T is convex, and its least is found by looking at which way it falls.
"""

from collections.abc import Callable
from dataclasses import replace

from rowwise.trainer.config import TrainConfig

SHARES = 50  # of what layers could keep, that are told apart


def least(value: Callable[[int], float], first: int, last: int) -> int:
    """Finds where a convex function of whole numbers from `first` to `last` is least."""
    while first < last:
        middle = (first + last) // 2
        if value(middle) <= value(middle + 1):
            last = middle
        else:
            first = middle + 1
    return first


def traded_share(
    config: TrainConfig, seconds: Callable[[TrainConfig], float], fits: Callable[[TrainConfig], bool]
) -> float | None:
    """Finds the share of what the layers of `config` could keep that is to leave the device, with which a step takes the fewest
    `seconds` and the host has room (`fits`); None where keeping everything is as fast, and fits."""

    def with_share(share: int) -> TrainConfig:
        return replace(config, memory=replace(config.memory, recompute=share / SHARES))

    def slow(share: int) -> float:
        return seconds(with_share(share))

    share = least(slow, 0, SHARES)
    while share and not fits(with_share(share)):
        share -= 1
    return None if share == SHARES else share / SHARES
