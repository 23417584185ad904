"""Chooses what layers keep: the results that save the most operations in the bytes that there are.

Every result that a layer's backward needs is made again where it is not kept, once, of results that are needed too. So bytes and
operations add up, over results and over layers that are alike, and the best choice is that of a bounded knapsack: of each kind of
result, how many layers keep theirs,

    most  sum over kinds of count x operations        where  sum of count x bytes  is at most what may stay.

It is solved by dynamic programming over the bytes, in whole numbers of their common divisor (of 1/65,536 of the room where that
is more: then it may miss so much of the bytes). The layers that keep a kind are spread evenly, so that stages of a pipeline
hold alike. It depends on the configuration alone: all ranks choose the same.
"""

import math
from collections.abc import Sequence

import numpy as np

from rowwise.parallel.activations.config import MemoryConfig
from rowwise.parallel.activations.results import LayerResults, Result

MOST_STATES = 1 << 16


def kept_results(
    config: MemoryConfig, layer: LayerResults, layers: int, itemsize: int, seen: float
) -> list[frozenset[str]]:
    """Names, for each layer, the results that it keeps besides its input. `itemsize`: of the dtype of computation; `seen`: how
    many tokens a token sees, on the mean."""
    # Of what takes no room there is nothing to choose.
    always = frozenset(result.name for result in layer.results if not result.numbers)
    match config.recompute:
        case "none":
            return [layer.names] * layers
        case "selective":
            return [always | {result.name for result in layer.results if result.dear}] * layers
        case "full":
            return [always] * layers
        case share:
            return _in_room(float(share), layer, layers, itemsize, seen, always)


def _in_room(
    share: float, layer: LayerResults, layers: int, itemsize: int, seen: float, always: frozenset[str]
) -> list[frozenset[str]]:
    kinds = [result for result in layer.results if result.numbers]
    everything, nothing = (layer.bytes_kept(kept, itemsize) for kept in (layer.names, always))
    room = math.floor(share * layers * everything) - layers * nothing
    counts = fill([kind.numbers * itemsize for kind in kinds], [kind.cost(seen) for kind in kinds], layers, room)
    chosen = list(zip(kinds, counts, strict=True))
    return [always | {kind.name for kind, count in chosen if _is_one_of(count, n, layers)} for n in range(layers)]


def leaving_results(
    share: float, layer: LayerResults, kept: Sequence[frozenset[str]], itemsize: int, coded: bool, seen: float
) -> list[frozenset[str]]:
    """Names, for each layer of a rank, what leaves the device of the results that it keeps, named in `kept`, where a `share` of
    their bytes may: after the inputs of layers, which always do, those with the most operations a byte (Liao et al., *Fuyou*), and of
    a kind the first layers', which wait the longest."""
    room = share * sum(layer.bytes_kept(names, itemsize, coded) for names in kept)
    room -= len(kept) * layer.input_bytes(itemsize, coded)
    leaves: list[set[str]] = [set() for _ in kept]
    for result in sorted(layer.results, key=lambda result: -_worth(result, itemsize, coded, seen)):
        for names, leave in zip(kept, leaves, strict=True):
            needed = result.bytes_waiting(result.name in names, itemsize, coded)
            if 0 < needed <= room:
                leave.add(result.name)
                room -= needed
    return [frozenset(leave) for leave in leaves]


def _worth(result: Result, itemsize: int, coded: bool, seen: float) -> float:
    """Operations that a byte stands for of a result that is kept."""
    return result.cost(seen) / max(1, result.bytes_waiting(True, itemsize, coded))


def _is_one_of(count: int, n: int, of: int) -> bool:
    """Whether n is among `count` of the numbers below `of`, evenly spread."""
    return (n + 1) * count // of > n * count // of


def fill(sizes: Sequence[int], gains: Sequence[float], copies: int, room: int) -> list[int]:
    """Says how many of each kind, at most `copies`, gain the most in `room`; of choices that gain as much, one that is smallest."""
    if room <= 0:
        return [0] * len(sizes)
    if room >= copies * sum(sizes):
        return [copies] * len(sizes)
    unit = max(math.gcd(*sizes), -(-room // MOST_STATES))
    states = room // unit
    best = np.zeros(states + 1)  # by what may be used at most
    taken = []
    for size, gain in zip(sizes, gains, strict=True):
        before, counts = best.copy(), np.zeros(states + 1, dtype=np.int64)
        for count in range(1, copies + 1):
            used = -(-count * size // unit)
            if used > states:
                break
            gained = before[: states + 1 - used] + count * gain
            better = gained > best[used:]
            best[used:][better] = gained[better]
            counts[used:][better] = count
        taken.append(counts)
    left, found = int(np.argmax(best == best[-1])), []
    for size, counts in zip(reversed(sizes), reversed(taken), strict=True):
        found.append(int(counts[left]))
        left -= -(-found[-1] * size // unit)
    return found[::-1]
