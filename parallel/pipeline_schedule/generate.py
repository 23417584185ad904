"""The schedules with a name. Activations are counted in whole ranks: what a micro-batch leaves on all chunks of a rank.

| name | chunks a rank | backward | bubble of p ranks and m micro-batches, F = I = W | most activations held |
|---|---|---|---|---|
| gpipe (Huang et al.) | v >= 1 | B | (p - 1) / (v m + p - 1) | m |
| 1f1b (Narayanan et al.) | 1 | B | (p - 1) / (m + p - 1) | p |
| interleaved_1f1b (Narayanan et al.) | v >= 2 | B | (p - 1) / (v m + p - 1) | ((v - 1) u + 2 p - 1) / v |
| zb_h1 (Qi et al.) | 1 | I, W | (p - 1) / (3 m + p - 1) | p |
| zb_h2 (Qi et al.) | 1 | I, W | as zb_h1; none where ranks do not wait for each other's step | 2 p - 1 |
| zb_v (Qi et al., *Controllable Memory*) | 2 | I, W | (p - 1) / (6 m + p - 1); none, as above | p |
| blockwise (Tang et al., *ZeroPP*) | v >= 1 | I, W | 2 (p - 1) / (3 v m + 2 (p - 1)), v >= 2 | u + 2 (p - 1) / v |

zb_h2 and zb_v reach theirs from 2 p - 1 micro-batches on. Micro-batches go through interleaved_1f1b and blockwise in
units of at least p and `unit`, as equal as can be; u is the largest. No rank holds more than m.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rowwise.parallel.pipeline_schedule.greedy import Ready, play
from rowwise.parallel.pipeline_schedule.order import Action, Schedule, loop_placement, v_placement
from rowwise.parallel.pipeline_schedule.simulate import uniform_costs


@dataclass(frozen=True)
class Shape:
    """What a schedule is made for: `ranks` x `chunks` stages, `micro_batches`, and the `unit` of blockwise."""

    ranks: int
    chunks: int
    micro_batches: int
    unit: int = 0


@dataclass(frozen=True)
class Generator:
    """A way to make a schedule: `make` and what it asks of a shape: `chunks` (least, most or None for any) and the fewest
    micro-batches."""

    make: Callable[[Shape], Schedule]
    chunks: tuple[int, int | None]
    fewest: Callable[[int], int]


def make_schedule(name: str, shape: Shape) -> Schedule:
    """Makes the schedule `name`. Raises ValueError where the shape does not fit it."""
    check_shape(name, shape)
    return GENERATORS[name].make(shape)


def check_shape(name: str, shape: Shape) -> None:
    """Refuses chunks and micro-batches that do not fit the schedule `name`. Raises ValueError."""
    least, most = GENERATORS[name].chunks
    if shape.chunks < least or (most is not None and shape.chunks > most):
        possible = f"{least}" if most == least else f"{least} and more"
        others = [n for n, g in GENERATORS.items() if g.chunks[0] <= shape.chunks <= (g.chunks[1] or shape.chunks)]
        raise ValueError(
            f"parallel.pipeline_schedule={name} with parallel.virtual_stages={shape.chunks}: possible is {possible}; "
            f"with {shape.chunks} go {', '.join(others)}"
        )
    fewest = GENERATORS[name].fewest(shape.ranks)
    if shape.micro_batches < fewest:
        others = [n for n, g in GENERATORS.items() if g.fewest(shape.ranks) <= shape.micro_batches]
        raise ValueError(
            f"parallel.pipeline_schedule={name} on {shape.ranks} ranks needs at least {fewest} micro-batches a step and "
            f"there are {shape.micro_batches}; give a larger batch.global_size or a smaller batch.micro_size"
            + (
                f", or one of {', '.join(others)}"
                if others
                else f", or parallel.pipeline={shape.micro_batches} or less"
            )
        )
    if name == "blockwise" and not shape.ranks <= shape.unit <= shape.micro_batches:
        raise ValueError(
            f"parallel.pipeline_unit={shape.unit}: a unit of blockwise has from {shape.ranks} (the ranks) to "
            f"{shape.micro_batches} (the micro-batches of a step)"
        )


def gpipe(shape: Shape) -> Schedule:
    """Orders all forwards, chunk by chunk, then all backwards; with chunks this is breadth-first (Lamy-Poirier)."""
    count = range(shape.micro_batches)
    return _by_rank(
        shape,
        lambda rank, stages: [
            *(Action(stage, "F", i) for stage in stages for i in count),
            *(Action(stage, "B", i) for stage in reversed(stages) for i in count),
        ],
    )


def one_f_one_b(shape: Shape) -> Schedule:
    """Has rank r forward p - r - 1 micro-batches ahead, then one forward, one backward."""
    return _by_rank(shape, lambda rank, stages: _alternate(shape, stages, shape.ranks - rank - 1))


def interleaved_one_f_one_b(shape: Shape) -> Schedule:
    """Orders 1F1B over chunks: units of micro-batches go through one chunk after another."""

    def order(rank: int, stages: list[int]) -> list[Action]:
        largest = max(map(len, units(shape.micro_batches, shape.ranks)))
        return _alternate(shape, stages, 2 * (shape.ranks - rank - 1) + (shape.chunks - 1) * largest)

    return _by_rank(shape, order)


def zb_h1(shape: Shape) -> Schedule:
    """Orders ZB-H1, with 1F1B's memory: weight gradients wait as long as no more than p micro-batches are held."""
    return _by_rank(shape, lambda rank, stages: _zero_bubble(shape, rank, shape.ranks - rank, shape.ranks))


def zb_h2(shape: Shape) -> Schedule:
    """Orders ZB-H2, with enough forwards ahead that no rank waits for its first backward."""
    p = shape.ranks
    return _by_rank(shape, lambda rank, stages: _zero_bubble(shape, rank, 2 * (p - rank) - 1, 2 * p - 1))


def zb_v(shape: Shape) -> Schedule:
    """Orders ZB-V: two chunks a rank, folded: the rank that forwards first also has the loss, so it gets gradients soon."""
    p = shape.ranks

    def order(rank: int, down: int, up: int) -> list[Action]:
        line = _Line(shape.micro_batches)
        line.repeat(2 * (p - rank) - 1, (down, "F"))
        line.repeat(rank, (up, "F"), (down, "F"))
        line.repeat(p - rank, (up, "F"), (up, "I"), (up, "W"))
        while line.lacks(down, "F") or line.lacks(up, "F"):
            line.repeat(1, (down, "F"), (down, "I"), (down, "W"), (up, "F"), (up, "I"), (up, "W"))
        line.repeat(rank, (down, "I"), (up, "I"))
        line.repeat(p - rank, (down, "I"), (down, "W"))
        for stage in (up, down):
            line.repeat(shape.micro_batches, (stage, "W"))
        return line.actions

    return Schedule(tuple(tuple(order(rank, *stages)) for rank, stages in enumerate(v_placement(p))))


def blockwise(shape: Shape) -> Schedule:
    """Orders a step by units: forwards breadth-first over the chunks, then input gradients, so that a chunk's weights are gathered
    once for each. Weight gradients fill the gaps; those that the next unit's gaps will take, 2 (p - 1 - r) on rank r, wait."""
    placement = loop_placement(shape.ranks, shape.chunks)
    orders = []
    for stages in placement:
        order: list[Action] = []
        for unit in units(shape.micro_batches, shape.unit):
            order += [Action(stage, "F", i) for stage in stages for i in unit]
            order += [Action(stage, "I", i) for stage in reversed(stages) for i in unit]
        orders.append(order)
    waiting: list[list[Action]] = [[] for _ in placement]
    positions = [0] * shape.ranks

    def choose(rank: int, ready: Ready) -> Action | None:
        order, at, weights = orders[rank], positions[rank], waiting[rank]
        if at == len(order):
            return weights.pop(0) if weights else None
        begins_unit = at > 0 and order[at].kind == "F" and order[at - 1].kind == "I"
        too_many = begins_unit and len(weights) > 2 * (shape.ranks - 1 - rank)
        if weights and (too_many or not ready(order[at])):
            return weights.pop(0)
        if not ready(order[at]):
            return None
        positions[rank] += 1
        if order[at].kind == "I":
            weights.append(order[at]._replace(kind="W"))
        return order[at]

    return play(placement, uniform_costs(shape.ranks * shape.chunks), choose)


def units(micro_batches: int, size: int) -> list[range]:
    """Returns as many units of at least `size` as there can be, as equal as they can be."""
    count = max(1, micro_batches // size)
    bounds = [micro_batches * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


class _Line:
    """A rank's order under construction: asks for the next micro-batch of a kind, and passes over those that are done."""

    def __init__(self, micro_batches: int):
        self.actions: list[Action] = []
        self._count = micro_batches
        self._next: dict[tuple[int, str], int] = {}

    def lacks(self, stage: int, kind: str) -> bool:
        return self._next.get((stage, kind), 0) < self._count

    def repeat(self, times: int, *kinds: tuple[int, str]) -> None:
        for stage, kind in kinds * times:
            if self.lacks(stage, kind):
                self.actions.append(Action(stage, kind, self._next.setdefault((stage, kind), 0)))
                self._next[stage, kind] += 1


def _by_rank(shape: Shape, order: Callable[[int, list[int]], Iterable[Action]]) -> Schedule:
    placement = loop_placement(shape.ranks, shape.chunks)
    return Schedule(tuple(tuple(order(rank, stages)) for rank, stages in enumerate(placement)))


def _alternate(shape: Shape, stages: list[int], ahead: int) -> list[Action]:
    """`ahead` forwards, then a forward and a backward in turn; chunk by chunk within units of at least p."""
    all_units = units(shape.micro_batches, shape.ranks)
    forward = [Action(stage, "F", i) for unit in all_units for stage in stages for i in unit]
    backward = [Action(stage, "B", i) for unit in all_units for stage in reversed(stages) for i in unit]
    ahead = min(ahead, len(forward))
    pairs = zip(forward[ahead:], backward, strict=False)
    return [*forward[:ahead], *(a for pair in pairs for a in pair), *backward[len(forward) - ahead :]]


def _zero_bubble(shape: Shape, stage: int, ahead: int, most: int) -> list[Action]:
    """`ahead` forwards, then input gradients and forwards in turn, with a weight gradient wherever `most` micro-batches
    are held or no forward is left."""
    line = _Line(shape.micro_batches)
    line.repeat(ahead, (stage, "F"))
    held = min(ahead, shape.micro_batches)
    while line.lacks(stage, "I"):
        line.repeat(1, (stage, "I"))
        if held == most or not line.lacks(stage, "F"):
            line.repeat(1, (stage, "W"))
            held -= 1
        if line.lacks(stage, "F"):
            line.repeat(1, (stage, "F"))
            held += 1
    line.repeat(shape.micro_batches, (stage, "W"))
    return line.actions


GENERATORS = {
    "gpipe": Generator(gpipe, (1, None), lambda p: p),
    "1f1b": Generator(one_f_one_b, (1, 1), lambda p: p),
    "interleaved_1f1b": Generator(interleaved_one_f_one_b, (2, None), lambda p: p),
    "zb_h1": Generator(zb_h1, (1, 1), lambda p: p),
    "zb_h2": Generator(zb_h2, (1, 1), lambda p: 2 * p - 1),
    "zb_v": Generator(zb_v, (2, 2), lambda p: 2 * p - 1),
    "blockwise": Generator(blockwise, (1, None), lambda p: p),
}
