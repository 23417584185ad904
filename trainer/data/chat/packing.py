"""Conversations -> samples of whole ones, side by side: which of them share a sample.

`best_fit`: the longest first, each into the sample with the least room that it fits in (best-fit decreasing: at most 11/9 of
the fewest samples there can be, and in practice a hundredth of them more; Johnson, 1974). `in_order`: as they stand, a new sample
where one does not fit. Both depend on the lengths and the room alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Packing = Literal["best_fit", "in_order"]


@dataclass(frozen=True)
class Packed:
    """Sample n holds `members[begins[n] : begins[n + 1]]`, numbers of conversations: int64."""

    begins: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, sample: int) -> np.ndarray:
        return self.members[self.begins[sample] : self.begins[sample + 1]]


def pack(sizes: np.ndarray, room: int, how: Packing) -> Packed:
    """Packs conversations that take `sizes` (n,) places, of 1 to `room` each. Samples stand in the order of their first
    conversation, and conversations of a sample in theirs."""
    assert not len(sizes) or 1 <= sizes.min() <= sizes.max() <= room
    bins = best_fit(sizes, room) if how == "best_fit" else _in_order(sizes, room)
    order = np.lexsort((np.arange(len(bins)), bins))
    _, begins, counts = np.unique(bins[order], return_index=True, return_counts=True)
    by_first = np.argsort(order[begins])
    members = [order[begins[n] : begins[n] + counts[n]] for n in by_first]
    ends = np.cumsum(counts[by_first], dtype=np.int64)
    return Packed(np.concatenate(([0], ends)), np.concatenate([np.empty(0, np.int64), *members]))


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Returns the number of the bin of each conversation. Bit r of a whole number says whether a bin with room r is open, so that the
    least that is enough is its lowest bit from there on: n room / 64 words are looked at in all."""
    bins = np.empty(len(sizes), dtype=np.int64)
    open_: dict[int, list[int]] = {}
    rooms, made = 0, 0
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        fitting = rooms >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            chosen = open_[left].pop()
            if not open_[left]:
                rooms ^= 1 << left
        else:
            left, chosen, made = room, made, made + 1
        bins[number] = chosen
        if left := left - size:
            open_.setdefault(left, []).append(chosen)
            rooms |= 1 << left
    return bins


def _in_order(sizes: Sequence[int] | np.ndarray, room: int) -> np.ndarray:
    bins = np.empty(len(sizes), dtype=np.int64)
    made, left = -1, 0
    for number, size in enumerate(np.asarray(sizes).tolist()):
        if size > left:
            made, left = made + 1, room
        bins[number], left = made, left - size
    return bins
