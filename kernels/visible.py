"""What tokens of packed sequences see of each other, as rectangles and triangles of queries and keys. No torch.

A token sees those of its own document that are not later, and of these the last `window`, itself among them, where there is one.
Between a run of queries and a run of keys (`Run`), what is seen in one document is a rectangle, a triangle and a rectangle, any of
which may be empty. A window makes a band of it: query n sees keys n + behind to n + ahead, w = ahead - behind + 1 of them, which
w - 1 queries at a time are two triangles of side w - 1, so that S queries cost S w pairs. Three of w = 4:

    1 1 1 2 . .        1: turned, the n-th from the last sees the last n
    . 1 1 2 2 .        2: causal, the n-th sees the first n
    . . 1 2 2 2
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
    n; `turned`: both are counted from the last. `sequence` is the one it is in, None for all."""

    sequence: int | None
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    turned: bool = False

    @property
    def pairs(self) -> int:
        """How many scores are computed for a head, of one sequence."""
        side = self.q1 - self.q0
        return side * (side + 1) // 2 if self.causal else side * (self.k1 - self.k0)


def document_pairs(length: int, window: int | None = None) -> int:
    """Counts the pairs of a token and one that it sees, itself included, in a document of `length`."""
    near = length if window is None else min(length, window)
    return near * (near + 1) // 2 + (length - near) * near


@functools.lru_cache(maxsize=256)  # the layers of a model ask for the same
def visible_areas(
    queries: tuple[Run, ...], keys: tuple[Run, ...], documents: Documents | None = None, window: int | None = None
) -> tuple[Area, ...]:
    """Returns what `queries` see of `keys`, as areas that do not overlap. All runs have one stride."""
    rows = ((0,),) if documents is None else documents.begins
    everywhere = len(set(rows)) == 1
    return tuple(
        Area(
            None if everywhere else sequence, q_offset + q0, q_offset + q1, k_offset + k0, k_offset + k1, causal, turned
        )
        for sequence, begins in enumerate(rows[:1] if everywhere else rows)
        for q, q_offset in _placed(queries)
        for k, k_offset in _placed(keys)
        for document in _between(begins, max(q.start, k.start), min(_end(q), _end(k)))
        for q0, q1, k0, k1, causal, turned in _areas_in(document, q, k, window)
    )


def tiles(area: Area, side: int) -> Iterator[Area]:
    """Cuts an area into rectangles and triangles of at most `side` queries and keys."""
    for q0 in range(area.q0, area.q1, side):
        q1 = min(q0 + side, area.q1)
        here = area.k0 + q0 - area.q0  # the key at which a triangle's tile stands on its diagonal
        first, last = area.k0, area.k1
        if area.causal:
            yield area._replace(q0=q0, q1=q1, k0=here, k1=here + q1 - q0)
            first, last = (here + q1 - q0, last) if area.turned else (first, here)
        for k0 in range(first, last, side):
            yield area._replace(q0=q0, q1=q1, k0=k0, k1=min(k0 + side, last), causal=False, turned=False)


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


Piece = tuple[int, int, int, int, bool, bool]  # an area of one document and one run of each


def _areas_in(document: tuple[int, int], q: Run, k: Run, window: int | None) -> Iterator[Piece]:
    (q_begin, q_end), (k_begin, k_end) = _inside(q, document), _inside(k, document)
    ahead = (q.start - k.start) // q.stride  # query n sees keys up to n + ahead
    behind = -sys.maxsize if window is None else -((k.start - q.start + window - 1) // q.stride)  # from n + behind on
    first = max(q_begin, k_begin - ahead)  # the first query that sees a key
    last = min(q_end, k_end - behind)  # behind the last that does
    if k_begin == k_end or first >= last or behind > ahead:
        return
    # From `whole` on queries see up to the last key, and from `left` on no longer the first.
    whole, left = (max(first, min(last, n)) for n in (k_end - ahead, k_begin - behind))
    for begin, end in pairwise(sorted({first, whole, left, last})):
        if begin < left:
            yield from _from_the_first(begin, end, k_begin, k_end, ahead, begin < whole)
        elif begin < whole:
            yield from _band(begin, end, behind, ahead)
        else:
            yield begin, end, begin + behind, end + behind, True, True
            if end + behind < k_end:
                yield begin, end, end + behind, k_end, False, False


def _from_the_first(begin: int, end: int, k_begin: int, k_end: int, ahead: int, causal: bool) -> Iterator[Piece]:
    """What queries see that see all keys from `k_begin` on, the n-th up to n + ahead, or all."""
    seen = begin + ahead if causal else k_end  # the first key that `begin` is the first to see
    if k_begin < seen:
        yield begin, end, k_begin, seen, False, False
    if causal:
        yield begin, end, seen, end + ahead, True, False


def _band(begin: int, end: int, behind: int, ahead: int) -> Iterator[Piece]:
    """What queries see of which n sees n + behind to n + ahead."""
    side = max(1, ahead - behind)
    for q0 in range(begin, end, side):
        q1 = min(q0 + side, end)
        if behind < ahead:
            yield q0, q1, q0 + behind, q1 + behind, True, True
            if q1 + behind < q0 + ahead:
                yield q0, q1, q1 + behind, q0 + ahead, False, False
        yield q0, q1, q0 + ahead, q1 + ahead, True, False


def _inside(run: Run, document: tuple[int, int]) -> tuple[int, int]:
    """Which tokens of the run, counted as they lie, are in the document."""
    begin, end = (min(max(-((run.start - place) // run.stride), 0), run.length) for place in document)
    return begin, end
