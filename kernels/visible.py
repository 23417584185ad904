"""What tokens of packed sequences see of each other, as rectangles and triangles of queries and keys. No torch.

A token sees those of its own document that are not later. Between a run of queries and a run of keys (`Run`), what is
seen in one document is a rectangle, a triangle and a rectangle, any of which may be empty.
"""

import functools
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


@dataclass(frozen=True, eq=False)  # compared by identity: what is derived from one is kept for it
class Documents:
    """Where documents begin in each sequence of a batch: places, ascending, the first of them 0. Host numbers."""

    begins: tuple[tuple[int, ...], ...]


class Run(NamedTuple):
    """Tokens start, start + stride, ... of a sequence, that lie next to each other."""

    start: int
    stride: int
    length: int


class Area(NamedTuple):
    """Queries [q0, q1) see keys [k0, k1), counted as they lie: every one, or (`causal`: as many of both) the n-th the first
    n. `sequence` is the one it is in, None for all."""

    sequence: int | None
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool

    @property
    def pairs(self) -> int:
        """How many scores are computed for a head, of one sequence."""
        side = self.q1 - self.q0
        return side * (side + 1) // 2 if self.causal else side * (self.k1 - self.k0)


@functools.lru_cache(maxsize=256)  # the layers of a model ask for the same
def visible_areas(
    queries: tuple[Run, ...], keys: tuple[Run, ...], documents: Documents | None = None
) -> tuple[Area, ...]:
    """Returns what `queries` see of `keys`, as areas that do not overlap. All runs have one stride."""
    rows = ((0,),) if documents is None else documents.begins
    everywhere = len(set(rows)) == 1
    return tuple(
        Area(None if everywhere else sequence, q_offset + q0, q_offset + q1, k_offset + k0, k_offset + k1, causal)
        for sequence, begins in enumerate(rows[:1] if everywhere else rows)
        for q, q_offset in _placed(queries)
        for k, k_offset in _placed(keys)
        for document in _between(begins, max(q.start, k.start), min(_end(q), _end(k)))
        for q0, q1, k0, k1, causal in _areas_in(document, q, k)
    )


def _placed(runs: tuple[Run, ...]) -> Iterator[tuple[Run, int]]:
    offset = 0
    for run in runs:
        yield run, offset
        offset += run.length


def _end(run: Run) -> int:
    return run.start + run.stride * run.length


def _between(begins: tuple[int, ...], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The documents, [begin, end), that reach into [start, end)."""
    first, last = bisect_right(begins, start) - 1, bisect_left(begins, end)
    return pairwise((*begins[first:last], begins[last] if last < len(begins) else sys.maxsize))


def _areas_in(document: tuple[int, int], q: Run, k: Run) -> Iterator[tuple[int, int, int, int, bool]]:
    (q_begin, q_end), (k_begin, k_end) = _inside(q, document), _inside(k, document)
    ahead = (q.start - k.start) // q.stride  # query n sees keys up to n + ahead
    first = max(q_begin, k_begin - ahead)  # the first query that sees a key
    whole = max(first, min(q_end, k_end - ahead))  # the first that sees more than the triangle's last does: all of them
    seen = first + ahead  # the first key that `first` is the first to see
    if k_begin == k_end or first >= q_end:
        return
    if first < whole:
        if k_begin < seen:
            yield first, whole, k_begin, seen, False
        yield first, whole, seen, whole + ahead, True
    if whole < q_end:
        yield whole, q_end, k_begin, k_end, False


def _inside(run: Run, document: tuple[int, int]) -> tuple[int, int]:
    """Which tokens of the run, counted as they lie, are in the document."""
    begin, end = (min(max(-((run.start - place) // run.stride), 0), run.length) for place in document)
    return begin, end
