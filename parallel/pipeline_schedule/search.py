"""Looks for the fastest schedule for measured times within a limit of memory (Qi et al., *Zero Bubble Pipeline
Parallelism*, section 3): the schedules with a name, ranks that go greedily by many habits, the integer programme where the
step is small, and else local search around the best of these.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.heuristic import Placement, greedy_schedules
from rowwise.parallel.pipeline_schedule.order import Action, Schedule, loop_placement, v_placement
from rowwise.parallel.pipeline_schedule.simulate import Costs, Deadlock, Gathering, peak_activations, period

_SLACK = 1 + 1e-9  # sums of floats within it are equal
_ACTIONS_A_SECOND = 1e6  # simulated; budgets count actions, not time, so that the same question has the same answer
_PLAY = 10  # simulated actions that cost as much as one that is played greedily
_STARTS = 3  # of local search
_EXACT = 48  # actions x chunks: up to here the integer programme mostly takes below two seconds


@dataclass(frozen=True)
class Found:
    """What a search found. `seconds`, `bubble`: the period of `schedule`. `how` it was made: a generator's name, "heuristic",
    "local search" or "integer programme". `proved`: nothing on the placements tried and within the limit is faster, since the
    integer programme says so (to 1e-6) or since the busiest rank waits no longer than it takes a forward to reach it."""

    schedule: Schedule
    seconds: float
    bubble: float
    how: str
    proved: bool


@dataclass(frozen=True)
class _Aim:
    """What is looked for."""

    shape: Shape
    costs: Costs
    limit: float
    synchronised: bool
    gathering: Gathering

    @property
    def actions(self) -> int:
        return 3 * self.shape.ranks * self.shape.chunks * self.shape.micro_batches


def find_schedule(
    shape: Shape,
    costs: Costs,
    limit: float,
    synchronised: bool = True,
    gathering: Gathering = "none",
    seconds: float = 10.0,
) -> Found:
    """Finds the fastest schedule for `shape` (its `unit` is chosen here) of which no rank holds more than `limit`, in the
    unit of `costs.held`; among equally fast ones the one that holds least. `synchronised`, `gathering`: as in `period`.

    Never slower than a schedule with a name that keeps to the limit. Stages go around the ranks in a loop; two chunks a
    rank also down and up again. Takes about `seconds`, counted in simulated actions: the same arguments give the same
    schedule, unless the integer programme, to which they are time, runs out of them. Raises ValueError where `limit` is
    too small for a single micro-batch.
    """
    stages = shape.ranks * shape.chunks
    if len(costs.forward) != stages:
        raise ValueError(f"the costs are of {len(costs.forward)} stages, the shape has {stages}; give an entry a stage")
    aim = _Aim(shape, costs, limit * _SLACK, synchronised, gathering)
    placements = [loop_placement(shape.ranks, shape.chunks)]
    if shape.chunks == 2 and shape.ranks > 1:
        placements.append(v_placement(shape.ranks))
    least = [max(sum(costs.held[stage] for stage in own) for own in placement) for placement in placements]
    placements = [placement for placement, needed in zip(placements, least, strict=True) if needed <= aim.limit]
    if not placements:
        raise ValueError(
            f"limit={limit:g} holds no micro-batch on all chunks of a rank: the smallest possible is {min(least)!r}; raise "
            "the limit, or give smaller micro-batches, more ranks or activation checkpointing"
        )
    budget = int(seconds * _ACTIONS_A_SECOND / aim.actions / (1 if synchronised else 2))
    pool = [*_named(aim), *islice(_greedy(aim, placements), max(4, budget // 2 // _PLAY))]
    bound, proved = min(_bound(aim, placement) for placement in placements), False
    if _best(aim, pool).seconds > bound * _SLACK:
        if synchronised and gathering == "none" and aim.actions * shape.chunks <= _EXACT:
            optima, proved = _exact(aim, placements, pool, seconds)
            pool += optima
        if not proved:
            starts = sorted(dict.fromkeys(pool), key=lambda found: found.seconds)[:_STARTS]
            pool += [_improve(aim, start, bound, budget // _STARTS) for start in starts]
    best = _best(aim, pool)
    return replace(best, proved=proved or best.seconds <= bound * _SLACK)


def _peak(aim: _Aim, schedule: Schedule) -> float:
    return max(peak_activations(actions, aim.costs) for actions in schedule.ranks)


def _rate(aim: _Aim, schedule: Schedule, how: str) -> list[Found]:
    """`schedule` with its period; nothing if it holds too much."""
    if _peak(aim, schedule) > aim.limit:
        return []
    return [Found(schedule, *period(schedule, aim.costs, aim.synchronised, aim.gathering), how, proved=False)]


def _best(aim: _Aim, pool: Sequence[Found]) -> Found:
    """Of the fastest the one that holds least, and of those the first."""
    fastest = min(found.seconds for found in pool)
    return min((f for f in pool if f.seconds <= fastest * _SLACK), key=lambda f: _peak(aim, f.schedule))


def _bound(aim: _Aim, placement: Placement) -> float:
    """No period is shorter: the work of a rank, and before it, if all begin together, the way of the first forward."""
    rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
    costs, longest = aim.costs, 0.0
    for stages in placement:
        work = sum(costs.forward[stage] + costs.input[stage] + costs.weight[stage] for stage in stages)
        before = range(min(stages)) if aim.synchronised else ()
        way = sum(costs.forward[s] + costs.send * (rank_of[s] != rank_of[s + 1]) for s in before)
        longest = max(longest, way + work * aim.shape.micro_batches)
    return longest + costs.step


def _named(aim: _Aim) -> Iterator[Found]:
    """Every schedule with a name that fits, blockwise with every unit that makes a difference."""
    shape = aim.shape
    for name in GENERATORS:
        counts = range(1, shape.micro_batches // shape.ranks + 1) if name == "blockwise" else [1]
        for unit in sorted({shape.micro_batches // count for count in counts}):
            try:
                schedule = make_schedule(name, replace(shape, unit=unit))
            except ValueError:  # the shape does not fit
                continue
            yield from _rate(aim, schedule, name)
            yield from _rate(aim, _split(schedule), "heuristic")


def _split(schedule: Schedule) -> Schedule:
    """I and W for every B: the gradient leaves sooner."""
    return Schedule(
        tuple(
            tuple(a._replace(kind=k) for a in actions for k in a.kind.replace("B", "IW")) for actions in schedule.ranks
        )
    )


def _exact(
    aim: _Aim, placements: Sequence[Placement], pool: Sequence[Found], seconds: float
) -> tuple[list[Found], bool]:
    """The optimum of each placement, and whether all are proved."""
    # Here, because scipy.optimize takes half a second that the start of every run would spend.
    from rowwise.parallel.pipeline_schedule.exact import solve

    if any(kept > held for kept, held in zip(aim.costs.kept, aim.costs.held, strict=True)):
        return [], False  # `solve` does not count that
    optima, proved = list[Found](), True
    for placement in placements:
        rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
        known = _best(aim, [found for found in pool if found.schedule.rank_of == rank_of])
        upper = known.seconds - aim.costs.step
        solved = solve(placement, aim.shape.micro_batches, aim.costs, aim.limit, upper, seconds)
        optimum = _rate(aim, solved[0], "integer programme") if solved else []
        proved &= solved is not None and solved[1] and bool(optimum)
        optima += optimum
    return optima, proved


def _improve(aim: _Aim, start: Found, bound: float, evaluations: int) -> Found:
    """Local search: moves one action at a time within its rank's order, and stays where that is not slower."""
    rng = random.Random(0)
    best, orders = start, list(start.schedule.ranks)
    places = [(rank, at) for rank, order in enumerate(orders) for at in range(len(order))]
    for _ in range(evaluations):
        if best.seconds <= bound * _SLACK:
            break
        rank, at = rng.choice(places)
        moved = _move(orders[rank], at, rng)
        if moved == orders[rank] or peak_activations(moved, aim.costs) > aim.limit:
            continue
        schedule = Schedule((*orders[:rank], moved, *orders[rank + 1 :]))
        try:
            seconds, bubble = period(schedule, aim.costs, aim.synchronised, aim.gathering)
        except Deadlock:
            continue
        if seconds <= best.seconds:
            orders[rank] = moved
            best = Found(schedule, seconds, bubble, "local search", proved=False)
    return best if best.seconds < start.seconds / _SLACK else start


def _move(order: tuple[Action, ...], at: int, rng: random.Random) -> tuple[Action, ...]:
    """The action at `at` anywhere between its neighbours of the same stage that it must not, or need not, pass: those of
    its own micro-batch and those of its own kind."""
    action, low, high = order[at], at, at

    def passes(other: Action) -> bool:
        return other.stage != action.stage or (other.kind != action.kind and other.micro_batch != action.micro_batch)

    while low > 0 and passes(order[low - 1]):
        low -= 1
    while high < len(order) - 1 and passes(order[high + 1]):
        high += 1
    rest, to = order[:at] + order[at + 1 :], rng.randint(low, high)
    return (*rest[:to], action, *rest[to:])


def _greedy(aim: _Aim, placements: Sequence[Placement]) -> Iterator[Found]:
    for schedule in greedy_schedules(aim.shape, aim.costs, aim.limit, placements):
        yield from _rate(aim, _split(schedule), "heuristic") or _rate(aim, schedule, "heuristic")
