"""Found schedules keep to the limit, are never slower than one with a name, and as fast as can be where that is known."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations, product

import pytest

from rowwise.parallel.pipeline_schedule.check import check_schedule
from rowwise.parallel.pipeline_schedule.exact import solve
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Action, Schedule, loop_placement, v_placement
from rowwise.parallel.pipeline_schedule.search import find_schedule
from rowwise.parallel.pipeline_schedule.simulate import Costs, Deadlock, peak_activations, period, uniform_costs

SLACK = 1 + 1e-9
QUICK = 0.02  # seconds of search


def holds(schedule: Schedule, costs: Costs) -> float:
    return max(peak_activations(actions, costs) for actions in schedule.ranks)


def random_costs(stages: int, seed: int, send: float = 0.0) -> Costs:
    """Whole numbers, so that equal is equal; another memory on every stage."""
    rng = random.Random(seed)
    forward, input, weight = (tuple(float(rng.randint(4, 12)) for _ in range(stages)) for _ in range(3))
    held = tuple(float(rng.randint(2, 4)) for _ in range(stages))
    return Costs(forward, input, weight, (3.0,) * stages, held, tuple(h / 2 for h in held), send, step=5.0)


def named(shape: Shape) -> Iterator[tuple[str, Schedule]]:
    for name in GENERATORS:
        for unit in range(1, shape.micro_batches + 1) if name == "blockwise" else [0]:
            try:
                yield name, make_schedule(name, replace(shape, unit=unit))
            except ValueError:
                continue


TIMES = {
    "equal": lambda stages, send: uniform_costs(stages, send=send),
    "long W": lambda stages, send: uniform_costs(stages, 1.0, 1.25, 2.5, send=send, kept=0.5),
    "unequal": lambda stages, send: random_costs(stages, 3, send),
}


# Micro-batches beyond one a rank, seconds of a message, the limit as a share of a pipeline's, and whether ranks wait for each other.
ALL = [*product([False, True], [0.0, 0.5], [1.0, 1.5, 2.0], [True, False])]
NOW = [
    (False, 0.0, 1.0, True), (True, 0.5, 1.0, False), (False, 0.0, 1.5, False), (True, 0.5, 1.5, True), (False, 0.5, 2.0, True),
    (True, 0.0, 2.0, False),
]  # fmt: skip


def test_by_default_every_two_are_met():
    for one, other in combinations(range(4), 2):
        assert {(case[one], case[other]) for case in NOW} == {(case[one], case[other]) for case in ALL}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("ranks", "chunks"), [*product([2, 3, 4], [1, 2])])
def test_never_slower_than_a_name_within_the_limit(ranks, chunks, times, full):
    for more, send, share, synchronised in ALL if full else NOW:
        shape = Shape(ranks, chunks, ranks + (ranks + 1) * more)
        costs = TIMES[times](ranks * chunks, send)
        limit = share * ranks * max(sum(costs.held[s] for s in own) for own in loop_placement(ranks, chunks))
        found = find_schedule(shape, costs, limit, synchronised, seconds=QUICK)
        check_schedule(found.schedule, ranks, ranks * chunks, shape.micro_batches)
        assert holds(found.schedule, costs) <= limit * SLACK
        assert (found.seconds, found.bubble) == period(found.schedule, costs, synchronised)
        for name, schedule in named(shape):
            if holds(schedule, costs) <= limit:
                assert found.seconds <= period(schedule, costs, synchronised)[0] * SLACK, name


@cache
def orders(micro_batches: int) -> list[tuple[tuple[str, int], ...]]:
    """Every order of a rank with one stage in which F, I and W of a micro-batch follow each other."""
    work = [(kind, i) for kind in "FIW" for i in range(micro_batches)]
    return [
        order
        for order in permutations(work)
        if all(order.index(("F", i)) < order.index(("I", i)) < order.index(("W", i)) for i in range(micro_batches))
    ]


def shortest(ranks: int, micro_batches: int, costs: Costs, limit: float, *rules) -> float:
    """By trying all."""
    best = float("inf")
    for choice in product(orders(micro_batches), repeat=ranks):
        schedule = Schedule(tuple(tuple(Action(r, kind, i) for kind, i in order) for r, order in enumerate(choice)))
        if holds(schedule, costs) <= limit:
            try:
                best = min(best, period(schedule, costs, *rules)[0])
            except Deadlock:
                continue
    return best


@pytest.mark.parametrize("seed", range(6))
def test_as_fast_as_the_best_of_all_orders(seed):
    """The integer programme for the first rules, local search for the others."""
    costs = random_costs(2, seed, send=float(seed % 2))
    for rules in [(True, "none"), (False, "none"), (True, "run"), (False, "micro_batch")]:
        for limit in (max(costs.held), 1.5 * max(costs.held), 2 * max(costs.held)):
            found = find_schedule(Shape(2, 1, 2), costs, limit, *rules, seconds=QUICK)
            assert found.seconds == pytest.approx(shortest(2, 2, costs, limit, *rules), rel=1e-9), (rules, limit)
            # Only the programme, and a rank that never waits once a forward has come, prove anything.
            work = [2 * (costs.forward[r] + costs.input[r] + costs.weight[r]) + costs.step for r in range(2)]
            no_wait = max(work[0], work[1] + rules[0] * (costs.forward[0] + costs.send))
            assert found.proved == (rules == (True, "none") or found.seconds <= no_wait * SLACK)


@pytest.mark.parametrize("share", [1.0, 1.5, 2.0])
def test_the_integer_programme_is_the_best_of_all_orders_of_three_ranks(share):
    costs = random_costs(3, 1, send=1.0)
    limit = share * max(costs.held)
    best = shortest(3, 2, costs, limit)
    schedule, proved = solve(loop_placement(3, 1), 2, costs, limit, 2 * best, 20.0)
    assert proved and holds(schedule, costs) <= limit
    assert period(schedule, costs)[0] == pytest.approx(best, rel=1e-9)
    assert solve(loop_placement(3, 1), 2, costs, limit, 0.99 * (best - costs.step), 20.0) is None


@pytest.mark.parametrize(
    ("ranks", "chunks", "micro_batches"), [(2, 1, 4), (2, 1, 5), (3, 1, 4), (4, 1, 4), (3, 1, 5), (2, 2, 2)]
)
def test_as_fast_as_the_integer_programme(ranks, chunks, micro_batches):
    """Gathering weights at no cost changes nothing but that the programme does not apply: local search stands alone, and
    no faster than what is proved to be fastest."""
    stages, shape = ranks * chunks, Shape(ranks, chunks, micro_batches)
    placements = [loop_placement(ranks, chunks), *([v_placement(ranks)] if chunks == 2 else [])]
    for seed in (11, 12):
        costs = replace(random_costs(stages, seed, send=1.0), gather=(0.0,) * stages)
        limit = ranks * chunks * max(costs.held)
        upper = max(period(schedule, costs)[0] for _, schedule in named(shape))
        solved = [solve(placement, micro_batches, costs, limit, upper, 20.0) for placement in placements]
        assert all(proved for _, proved in solved)
        best = min(period(schedule, costs)[0] for schedule, _ in solved)
        found = find_schedule(shape, costs, limit, seconds=5.0)
        assert found.proved and found.seconds == pytest.approx(best, rel=1e-9)
        assert find_schedule(shape, costs, limit, gathering="run", seconds=QUICK).seconds >= best / SLACK


@pytest.mark.parametrize("synchronised", [True, False])
def test_the_same_question_has_the_same_answer(synchronised):
    costs = random_costs(4, 7)
    ask = lambda: find_schedule(Shape(4, 1, 9), costs, 5 * max(costs.held), synchronised, seconds=0.1)  # noqa: E731
    assert ask() == ask()


def test_local_search_finds_what_no_habit_does():
    hows = {
        find_schedule(Shape(4, 1, 9), costs, 4 * max(costs.held), synchronised=False, seconds=0.2).how
        for costs in (random_costs(4, seed, send=1.0) for seed in range(4))
    }
    assert "local search" in hows


def test_a_limit_below_one_micro_batch_is_refused_and_the_smallest_works():
    costs = random_costs(6, 5)
    shape = Shape(3, 2, 4)
    smallest = min(
        max(sum(costs.held[s] for s in own) for own in placement)
        for placement in (loop_placement(3, 2), v_placement(3))
    )
    with pytest.raises(ValueError, match=f"smallest possible is {smallest}"):
        find_schedule(shape, costs, 0.99 * smallest)
    for kept in (costs.kept, tuple(2 * held for held in costs.held)):  # with more kept than held only B fits
        tight = replace(costs, kept=kept)
        found = find_schedule(shape, tight, smallest, seconds=QUICK)
        check_schedule(found.schedule, 3, 6, 4)
        assert holds(found.schedule, tight) <= smallest


def test_costs_of_other_stages_are_refused():
    with pytest.raises(ValueError, match="of 3 stages, the shape has 4"):
        find_schedule(Shape(2, 2, 4), uniform_costs(3), 4.0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_bubble_where_there_need_be_none(ranks):
    """2 p - 1 micro-batches in a row of stages, or p down and up again, if ranks do not wait for each other's step."""
    one = find_schedule(Shape(ranks, 1, 3 * ranks), uniform_costs(ranks), 2 * ranks - 1, False, seconds=QUICK)
    two = find_schedule(Shape(ranks, 2, 3 * ranks), uniform_costs(2 * ranks), 2 * ranks, False, seconds=QUICK)
    for found in (one, two):
        assert found.bubble == pytest.approx(0.0, abs=1e-12) and found.proved
    assert two.schedule.stages_of(0) == [0, 2 * ranks - 1]


def test_dear_gathers_are_counted():
    """Where weights are gathered for every run, runs are long; and the period is the one with gathers."""
    costs = uniform_costs(4, gather=4.0)
    shape = Shape(2, 2, 8)
    blind = find_schedule(shape, costs, 16.0, seconds=QUICK)
    found = find_schedule(shape, costs, 16.0, gathering="run", seconds=QUICK)
    assert found.seconds == period(found.schedule, costs, gathering="run")[0]
    assert found.seconds < period(blind.schedule, costs, gathering="run")[0]
    for name, schedule in named(shape):
        assert found.seconds <= period(schedule, costs, gathering="run")[0] * SLACK, name
