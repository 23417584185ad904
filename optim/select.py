"""The exact k-th largest of numbers that are spread over ranks, by radix select: nothing but counts crosses ranks.

Numbers become 64-bit keys in the same order: |x| by its IEEE bits, which are ordered as the magnitudes are. From the
most significant digit of 8 bits on, every rank counts how many of its keys have each of the 256 values; the counts are
summed over ranks, the digit of the k-th largest is read off, and only keys that begin with the digits found so far are
counted on. Where more keys than needed equal the k-th, those at the smallest logical positions are taken, found in the
same way. So *which* k are chosen does not depend on how they are spread.

Many problems (a layer each, say) share each message: digits x problems x 256 counts of 8 bytes, however many numbers
there are; 4 digits for float32, 8 for float64, and as many as a position has where ties are to be broken. Beside its
operands a rank holds the keys of one portion of rows; the host waits for the device once a digit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.portions import device_portions

BINS = 256
NOTHING = (1 << 63) - 1  # above every key
Groups = Sequence[dist.ProcessGroup]
Keys = Callable[[slice], Tensor]  # int64, of some rows; negative where there is no candidate


@dataclass(frozen=True)
class Candidates:
    """This rank's rows of one tensor `like` (r, n), and their keys. `start`: the logical position of the first entry, in the
    order in which ties are broken."""

    like: Tensor
    start: int
    keys: Keys

    def portions(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows, their keys), a portion of rows at a time."""
        for rows in device_portions(self.like, self.like.size(1)):
            yield rows, self.keys(rows)

    def positions(self, rows: slice) -> Tensor:
        """Returns the logical positions of some rows, laid like their keys."""
        columns = self.like.size(1)
        first, last = (self.start + row * columns for row in (rows.start, rows.stop))
        return torch.arange(first, last, device=self.like.device).view(-1, columns)


@dataclass(frozen=True)
class Problem:
    """Choose the `k` largest of all candidates, of this rank and the others. Positions are below `size`."""

    k: int
    size: int
    candidates: list[Candidates]


@dataclass(frozen=True)
class Cut:
    """Where the chosen end: keys above `bits` are chosen, and those equal to it at positions up to `position`, or all
    of them."""

    bits: int
    position: int | None = None

    def takes(self, candidates: Candidates, rows: slice, keys: Tensor) -> Tensor:
        """Says whether each of some rows' entries, whose keys these are, is chosen."""
        if self.position is None:
            return (keys >= 0) & (keys >= self.bits)
        last = candidates.positions(rows) <= self.position
        return (keys >= 0) & ((keys > self.bits) | ((keys == self.bits) & last))


def magnitude_keys(x: Tensor) -> Tensor:
    """Returns keys in the order of |x|: its IEEE bits, of float32 for 16-bit numbers. NaN is above everything."""
    if x.dtype == torch.float64:
        return x.abs().view(torch.int64)
    return x.float().abs().view(torch.int32).long()


def magnitude_of(bits: int, dtype: torch.dtype) -> float:
    """Returns |x| of a key made from that dtype."""
    narrow = dtype != torch.float64
    whole = torch.tensor(bits, dtype=torch.int32 if narrow else torch.int64)
    return whole.view(torch.float32 if narrow else torch.float64).item()


def key_bits(dtype: torch.dtype) -> int:
    """Says how many bits the keys of that dtype have."""
    return 64 if dtype == torch.float64 else 32


def select(problems: list[Problem], bits: int, groups: Groups, device: torch.device) -> list[Cut]:
    """Selects the cut of every problem. All ranks of `groups`, over which one after the other counts are summed, call it with as
    many problems and the same `k`. `bits`: how many the keys have. Raises ValueError where fewer than k candidates exist.
    """
    ks = [problem.k for problem in problems]
    found = _radix([_keys(problem) for problem in problems], ks, bits, groups, device)
    cuts = [Cut(NOTHING if key is None else key) for key, _, _ in found]
    torn = [i for i, (_, left, equal) in enumerate(found) if left < equal]
    if torn:
        # The smallest positions are the largest when they are counted from the end.
        width = -(-max(problems[i].size for i in torn).bit_length() // 8) * 8
        end = (1 << width) - 1
        parts = [_tied(problems[i], cuts[i].bits, end) for i in torn]
        places = _radix(parts, [found[i][1] for i in torn], width, groups, device)
        for i, (place, _, _) in zip(torn, places, strict=True):
            assert place is not None
            cuts[i] = Cut(cuts[i].bits, end - place)
    return cuts


def next_below(problems: list[Problem], cuts: list[Cut], groups: Groups, device: torch.device) -> list[int]:
    """Returns the largest key below each cut; negative where there is none. One all-reduce of a number each for each group."""
    found = torch.full((len(problems),), -1, dtype=torch.int64, device=device)
    for i, (problem, cut) in enumerate(zip(problems, cuts, strict=True)):
        for part in problem.candidates:
            for _, keys in part.portions():
                found[i] = torch.maximum(found[i], torch.where(keys < cut.bits, keys, -1).max())
    for group in groups if problems else ():
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found.tolist()


Values = Callable[[], Iterator[Tensor]]  # negative where there is none


def _keys(problem: Problem) -> Values:
    return lambda: (keys for part in problem.candidates for _, keys in part.portions())


def _tied(problem: Problem, bits: int, end: int) -> Values:
    def values() -> Iterator[Tensor]:
        for part in problem.candidates:
            for rows, keys in part.portions():
                yield torch.where(keys == bits, end - part.positions(rows), -1)

    return values


def _radix(
    parts: list[Values], ks: list[int], bits: int, groups: Groups, device: torch.device
) -> list[tuple[int | None, int, int]]:
    """(the k-th largest, how many equal to it are among the k, how many are equal to it) of each; (None, 0, 0) for k = 0."""
    if not parts:
        return []
    prefixes, left, equal = [0] * len(ks), list(ks), [0] * len(ks)
    for shift in range(bits - 8, -1, -8):
        counts = torch.zeros(len(ks), BINS + 1, dtype=torch.int64, device=device)  # the last: of no interest
        for i, values in enumerate(parts):
            for value in values() if ks[i] else ():
                # The first digit has nothing before it, and 64-bit numbers cannot be shifted by 64.
                here = value >= 0 if shift + 8 >= bits else (value >> (shift + 8)) == prefixes[i]
                digits = torch.where(here, (value >> shift) & (BINS - 1), BINS).view(-1)
                counts[i].scatter_add_(0, digits, torch.ones_like(digits[:1]).expand_as(digits))
        counts = counts[:, :BINS].contiguous()
        for group in groups:
            dist.all_reduce(counts, group=group)
        at_least = counts.flip(1).cumsum(1).flip(1).cpu().numpy()
        digits = (at_least >= np.array(left)[:, None]).sum(1) - 1  # the largest that so many have, or more
        for i, total in enumerate(at_least):
            if not ks[i]:
                continue
            if total[0] < left[i]:
                raise ValueError(f"{ks[i]} are to be chosen, and there are {total[0]} candidates")
            digit = int(digits[i])
            above = int(total[digit + 1]) if digit + 1 < BINS else 0
            prefixes[i], left[i], equal[i] = prefixes[i] << 8 | digit, left[i] - above, int(total[digit]) - above
    return [(p, n, e) if k else (None, 0, 0) for k, p, n, e in zip(ks, prefixes, left, equal, strict=True)]
