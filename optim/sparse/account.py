"""What masks do: how many weights live where, how much of a mask is new, and what a token costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from rowwise.optim.sparse.config import NM, ST3, PDPBase, RigL, SparsityConfig, SRigL, every
from rowwise.optim.sparse.layers import Layers
from rowwise.optim.sparse.masks import count


@dataclass(frozen=True)
class Account:
    """Counts over all ranks, a number for every sparse matrix: weights that are `active`, of those how many were so in
    the `first` mask and in the one `last` counted, and rows without any (`dead`: neurons whose output is 0). `firsts`:
    weights of the first mask."""

    names: list[str]
    sizes: list[int]
    active: list[int]
    in_first: list[int]
    in_last: list[int]
    firsts: list[int]
    dead: list[int]

    @property
    def density(self) -> float:
        return sum(self.active) / sum(self.sizes)

    def record(self) -> dict[str, float | int | dict[str, float]]:
        """Returns what metrics.jsonl keeps. `mask_overlap_first`: the share of the first mask that is active; `mask_replaced`: the
        share of the active weights that were not when last counted."""
        active, overlap = max(1, sum(self.active)), sum(self.in_first) / max(1, sum(self.firsts))
        # The first mask of a model that begins dense is that of its first pruning.
        begun = {} if sum(self.firsts) == sum(self.sizes) else {"mask_overlap_first": overlap}
        return {
            **begun,
            "dead_neurons": sum(self.dead),
            "mask_replaced": 1 - sum(self.in_last) / active,
            "density_by_layer": {
                name: n / size for name, n, size in zip(self.names, self.active, self.sizes, strict=True)
            },
        }


def take_account(layers: Layers) -> Account:
    """Counts, and takes the masks of now for those last counted. One all-reduce of 5 numbers a matrix for each group of
    `layers.model`."""
    counts = layers.zeros(5)
    for layer in layers.mine:
        first, last, here = layer.local_first, layer.local_last, counts[layer.index]
        for i, packed in enumerate((layer.bits, layer.bits & first, layer.bits & last, first)):
            here[i] = count(packed, layer.columns)
        here[4] = (layer.bits == 0).all(1).sum()
        last.copy_(layer.bits)
    active, in_first, in_last, firsts, dead = map(list, zip(*layers.sum(counts, layers.model), strict=True))
    return Account(layers.names, [s.numel() for s in layers.shapes], active, in_first, in_last, firsts, dead)


def begin_account(layers: Layers) -> None:
    """Takes the masks of now for the first ones."""
    for layer in layers.mine:
        layer.local_first.copy_(layer.bits)
        layer.local_last.copy_(layer.bits)


def weights_multiplied(
    config: SparsityConfig, active: Sequence[int], sizes: Sequence[int], step: int, steps: int
) -> tuple[float, float]:
    """Counts how many weights of the sparse matrices a token meets in (the forward, the backward), were zeros left out; the
    backward multiplies for the input's gradient and for the weights'. RigL's dense gradients are spread over the steps
    from one update to the next (Evci et al., appendix H)."""
    some, everything = sum(active), sum(sizes)
    if isinstance(config, PDPBase) and config.first_step(steps) <= step <= config.last_step(steps):
        return everything, 2 * everything  # soft masks
    if isinstance(config, ST3 | NM):
        return some, some + everything
    if isinstance(config, RigL | SRigL) and config.first_step(steps) <= step < config.last_step(steps):
        gap = every(config.update_every, steps)
        return some, some + (some * (gap - 1) + everything) / gap
    return some, 2 * some
