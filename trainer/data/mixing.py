"""The order of a mixture: which source sample k of a run comes from, and which of that source's own samples it is.

Shares are millionths, whole numbers p_i that sum to P. Sources are asked in turn. Of m samples that reach source i, of which it
and those behind it have R_i = p_i + p_(i+1) + ... millionths, it has taken

    c_i(m) = floor((m p_i + u_i) / R_i)        and m - c_i(m) go on to the next; u_i in [0, R_i): a phase drawn by the key

so that sample m is its own where c_i(m + 1) > c_i(m), and is then number c_i(m) of its samples, in an order of its own. All is whole
numbers in closed form: any sample is found without those before it, counts are exact, never further from the shares than a
sample for each source before, and exactly the shares every P samples; and the order is the same on every machine and layout.

Shares that change, or a source that ends, begin a new stretch of the order. It goes on from the counts that the stretch before it
came to, and from what was left of its divisions, so that nothing is rounded twice.
"""

import functools
import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

PARTS = 1_000_000  # of which shares are
LARGEST = 1 << 42  # samples of an order: times PARTS they are whole numbers of 64 bits


@dataclass(frozen=True)
class Dealing:
    """What the order is made of. `sizes`: samples of each source. `shares`: (the first sample that it is for, the millionths of each
    source), ascending from sample 0. `ends`: whether a source is left out once it has given every sample once; else it begins
    again."""

    sizes: tuple[int, ...]
    shares: tuple[tuple[int, tuple[int, ...]], ...]
    ends: bool = False

    @property
    def length(self) -> int | None:
        """The samples of the whole order; None: it never ends."""
        return sum(self.sizes) if self.ends else None


@dataclass(frozen=True)
class Stretch:
    """A part of the order in which shares stay. `first`: its first sample; `drawn`: what each source gave before it; `phases`: u_i of
    each, in millionths of R_i."""

    first: int
    drawn: tuple[int, ...]
    shares: tuple[int, ...]
    phases: tuple[int, ...]

    def deal(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sources (n,) of the samples `numbers` (n,) of the order, and which of its source's draws each is."""
        reach, rest = numbers - self.first, sum(self.shares)
        sources, draws = np.zeros_like(numbers), np.full_like(numbers, -1)
        for source, (share, phase, before) in enumerate(zip(self.shares, self.phases, self.drawn, strict=True)):
            if not share:
                continue
            begun = phase * rest // PARTS
            taken = (reach * share + begun) // rest
            its = (draws < 0) & (((reach + 1) * share + begun) // rest > taken)
            sources[its], draws[its] = source, before + taken[its]
            reach, rest = reach - taken, rest - share
        return sources, draws

    def counts(self, number: int) -> tuple[int, ...]:
        """Returns how many of the samples before `number` each source gave."""
        return tuple(before + taken for before, (taken, _) in zip(self.drawn, self._divided(number), strict=True))

    def drawn_of(self, source: int) -> Callable[[int], int]:
        """Returns what says how many of the samples before a number one source gave."""
        return lambda number: self.counts(number)[source]

    def followed_by(self, first: int, shares: tuple[int, ...]) -> "Stretch":
        """Returns the stretch that goes on from sample `first` with other shares."""
        return Stretch(first, self.counts(first), shares, tuple(left for _, left in self._divided(first)))

    def _divided(self, number: int) -> list[tuple[int, int]]:
        """c_i of the samples before `number`, and what is left of each division, in millionths of R_i."""
        reach, rest, found = number - self.first, sum(self.shares), []
        for share, phase in zip(self.shares, self.phases, strict=True):
            if not rest:
                found.append((0, phase))
                continue
            taken, left = divmod(reach * share + phase * rest // PARTS, rest)
            found.append((taken, left * PARTS // rest))
            reach, rest = reach - taken, rest - share
        return found


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the millionths nearest to these weights, which sum to PARTS: those with the largest remainders are rounded up. What is
    above zero gets one at least. Raises ValueError where no weight is."""
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"weights {list(weights)}: they are at least 0, and one of them above")
    exact = [weight / total * PARTS for weight in weights]
    shares = [max(int(part), int(part > 0)) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: max(0, PARTS - sum(shares))]:
        shares[i] += 1
    shares[shares.index(max(shares))] -= sum(shares) - PARTS  # what the least got beyond their part
    return tuple(shares)


@functools.lru_cache(maxsize=16)
def stretches(dealing: Dealing, key: str) -> tuple[Stretch, ...]:
    """Returns the stretches of the order that `key` names, ascending."""
    none, end = (0,) * len(dealing.sizes), dealing.length or LARGEST
    found = [Stretch(0, none, none, tuple(_phase(key, source) for source in range(len(none))))]
    for (first, shares), (stop, _) in pairwise((*dealing.shares, (end, none))):
        while first < min(stop, end):
            left = _of_those_left(found[-1].counts(first), shares, dealing)
            found.append(found[-1].followed_by(first, left))
            first = _first_end(found[-1], dealing, min(stop, end))
    return tuple(found[1:])


def deal(dealing: Dealing, key: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sources (n,) of the samples `numbers` (n,), int64, of the order that `key` names, and which of its source's draws
    each is. Raises ValueError beyond its end."""
    if len(numbers) and (last := int(numbers.max())) >= (end := dealing.length or LARGEST):
        raise ValueError(
            f"sample {last:,} of a mixture, which has {end:,}; give fewer steps, or data.when_short=repeat"
        )
    parts = stretches(dealing, key)
    sources, draws = np.empty_like(numbers), np.empty_like(numbers)
    places = np.searchsorted([part.first for part in parts], numbers, side="right") - 1
    for place in np.unique(places):
        here = places == place
        sources[here], draws[here] = parts[place].deal(numbers[here])
    return sources, draws


def counts(dealing: Dealing, key: str, number: int) -> tuple[int, ...]:
    """Returns how many of the samples before `number` each source gives."""
    parts = stretches(dealing, key)
    return parts[max(0, bisect_left(parts, number, key=lambda part: part.first) - 1)].counts(number)


def _phase(key: str, source: int) -> int:
    digest = hashlib.sha256(f"{key}/source {source}".encode()).digest()
    return int.from_bytes(digest[:8], "little") * PARTS >> 64


def _of_those_left(drawn: tuple[int, ...], shares: tuple[int, ...], dealing: Dealing) -> tuple[int, ...]:
    """The shares, where sources that have given all leave theirs to the others; equal ones where those have none."""
    if not dealing.ends:
        return shares
    open_ = [count < size for count, size in zip(drawn, dealing.sizes, strict=True)]
    left = [share * there for share, there in zip(shares, open_, strict=True)]
    return shares_of(left if any(left) else open_)


def _first_end(stretch: Stretch, dealing: Dealing, stop: int) -> int:
    """Where the first source has given all within a stretch, or where that ends anyway."""
    if not dealing.ends:
        return stop
    for i, size in enumerate(dealing.sizes):
        if stretch.shares[i]:
            stop = stretch.first + bisect_left(range(stretch.first, stop), size, key=stretch.drawn_of(i))
    return stop
