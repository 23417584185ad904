"""Pipeline schedules: every named one can be carried out, holds what it says and waits as long as its formula; the
simulator agrees with a naive one."""

import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest

from rowwise.parallel.pipeline_schedule.check import check_schedule
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, check_shape, make_schedule, units
from rowwise.parallel.pipeline_schedule.greedy import play
from rowwise.parallel.pipeline_schedule.order import Action, Schedule, loop_placement, v_placement
from rowwise.parallel.pipeline_schedule.simulate import (
    Costs,
    Deadlock,
    gathers,
    peak_activations,
    period,
    simulate,
    uniform_costs,
)

PACKAGE = "check cut generate greedy order simulate trace"


def shapes(name: str) -> Iterator[Shape]:
    """1 to 8 ranks, 1 to 3 chunks, micro-batches and units that divide and that do not."""
    least, most = GENERATORS[name].chunks
    for ranks, chunks in product(range(1, 9), range(least, (most or 3) + 1)):
        fewest = GENERATORS[name].fewest(ranks)
        for count in sorted({fewest, fewest + 1, 2 * ranks, 3 * ranks + 2, 4 * ranks - 1, 16} - set(range(fewest))):
            sizes = {ranks, ranks + 1, 2 * ranks, count} if name == "blockwise" else {0}
            for unit in sorted(size for size in sizes if size <= count and (size >= ranks or not size)):
                yield Shape(ranks, chunks, count, unit)


def shape_units(name: str, shape: Shape) -> list[int]:
    return [len(unit) for unit in units(shape.micro_batches, shape.unit if name == "blockwise" else shape.ranks)]


def peak_of(name: str, shape: Shape) -> int:
    """The last column of generate.py's table, times the chunks: counted in stages. No rank holds more than there is.
    (interleaved_1f1b: with units of p that is the same, and larger ones add only to the chunks before the last.)"""
    p, v, largest = shape.ranks, shape.chunks, max(shape_units(name, shape))
    return min(
        v * shape.micro_batches,
        {
            "gpipe": v * shape.micro_batches,
            "1f1b": p,
            "interleaved_1f1b": (v - 1) * largest + 2 * p - 1,
            "zb_h1": p,
            "zb_h2": 2 * p - 1,
            "zb_v": 2 * p,
            "blockwise": v * largest + 2 * (p - 1),
        }[name],
    )


def fills_its_gaps(name: str, shape: Shape) -> bool:
    """Whether a unit of blockwise has as many input gradients as the gap before the next has room for weights'."""
    sizes = shape_units(name, shape)
    return name != "blockwise" or len(sizes) == 1 or shape.chunks * min(sizes) >= 2 * (shape.ranks - 1)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_named_schedule_is_complete_free_of_deadlock_and_holds_what_it_says(name):
    for shape in shapes(name):
        schedule = make_schedule(name, shape)
        peak = max(check_schedule(schedule, shape.ranks, shape.ranks * shape.chunks, shape.micro_batches))
        assert peak <= peak_of(name, shape), shape
        if fills_its_gaps(name, shape):
            assert peak == peak_of(name, shape), shape


@pytest.mark.parametrize("name", GENERATORS)
def test_with_equal_times_the_bubble_is_the_closed_form(name):
    """Also where the units are not equal; for blockwise exactly where each unit fills the gap of the next, which with
    two chunks it always does."""
    waits = {"gpipe": 3, "1f1b": 3, "interleaved_1f1b": 3, "zb_h1": 1, "zb_h2": 1, "zb_v": 1, "blockwise": 2}[name]
    for shape in shapes(name):
        work = 3 * shape.chunks * shape.micro_batches
        timeline = simulate(make_schedule(name, shape), uniform_costs(shape.ranks * shape.chunks))
        assert timeline.busy == work * shape.ranks
        exact = timeline.makespan == work + waits * (shape.ranks - 1)
        assert exact == fills_its_gaps(name, shape), shape
        assert shape.chunks == 1 or fills_its_gaps(name, shape)


@pytest.mark.parametrize("name", ["zb_h2", "zb_v"])
def test_without_synchronisation_there_is_no_bubble(name):
    for shape in shapes(name):
        stages = shape.ranks * shape.chunks
        seconds, bubble = period(make_schedule(name, shape), uniform_costs(stages), synchronised=False)
        assert (seconds, bubble) == (3 * shape.chunks * shape.micro_batches, 0.0), shape


TIMES = list(product(range(1, 5), repeat=3))


@pytest.mark.parametrize(
    ("name", "synchronised", "waits", "exactly_where"),
    [
        ("gpipe", True, lambda f, i, w: f + i + w, lambda f, i, w: True),
        ("1f1b", True, lambda f, i, w: f + i + w, lambda f, i, w: True),
        ("1f1b", False, lambda f, i, w: f + i + w, lambda f, i, w: True),
        ("zb_h1", True, lambda f, i, w: f + i - w, lambda f, i, w: w <= f and w <= i),
        ("zb_h1", False, lambda f, i, w: f + i - w, lambda f, i, w: w <= f),
        ("zb_h2", False, lambda f, i, w: max(0, f + i - 2 * w), lambda f, i, w: min(i, w) <= f),
    ],
)
def test_with_unequal_times_a_rank_waits_p_minus_1_times(name, synchronised, waits, exactly_where):
    """Qi et al., table 2, and where it holds: there and nowhere else."""
    for p, extra in ((2, 0), (3, 1), (4, 6)):
        shape = Shape(p, 1, GENERATORS[name].fewest(p) + extra)
        schedule = make_schedule(name, shape)
        for f, i, w in TIMES:
            seconds, _ = period(schedule, uniform_costs(p, f, i, w), synchronised)
            exact = seconds == shape.micro_batches * (f + i + w) + (p - 1) * waits(f, i, w)
            assert exact == exactly_where(f, i, w), (shape, f, i, w)


def test_zb_h2_that_waits_for_each_others_step_waits_for_the_first_forward_too():
    for p, (f, i, w) in product((2, 3, 5), TIMES):
        if w <= f:
            timeline = simulate(make_schedule("zb_h2", Shape(p, 1, 3 * p)), uniform_costs(p, f, i, w))
            assert timeline.makespan == 3 * p * (f + i + w) + (p - 1) * max(f, f + i - 2 * w)


def test_the_optimizer_step_is_time_and_no_bubble():
    schedule, costs = make_schedule("1f1b", Shape(4, 1, 8)), uniform_costs(4, step=5.0)
    assert period(schedule, costs) == (24 + 9 + 5, pytest.approx(9 / 38))
    schedule, costs = make_schedule("zb_h2", Shape(4, 1, 8)), uniform_costs(4, step=5.0)
    assert period(schedule, costs, synchronised=False) == (24 + 5, 0.0)


def random_schedule(rng: random.Random) -> Schedule:
    """What ranks do that pick at random among what is possible: so it is possible."""
    ranks, count, splits = rng.randint(1, 4), rng.randint(1, 6), rng.random() < 0.7
    placement = v_placement(ranks) if rng.random() < 0.3 else loop_placement(ranks, rng.randint(1, 3))
    left = [{Action(stage, "F", i) for stage in stages for i in range(count)} for stages in placement]

    def choose(rank, ready):
        possible = sorted(action for action in left[rank] if ready(action))
        if not possible:
            return None
        action = rng.choice(possible)
        left[rank].remove(action)
        if action.kind == "F":
            left[rank].add(action._replace(kind=rng.choice("IB") if splits else "B"))
        elif action.kind == "I":
            left[rank].add(action._replace(kind="W"))
        return action

    return play(placement, random_costs(rng, sum(map(len, placement))), choose)


def random_costs(rng: random.Random, stages: int) -> Costs:
    each = [tuple(rng.uniform(0.1, 3.0) for _ in range(stages)) for _ in range(6)]
    return Costs(*each, send=rng.choice([0.0, rng.uniform(0.0, 2.0)]))


def naive_ends(schedule: Schedule, costs: Costs, begin: list[float]) -> dict[Action, float]:
    """When each action ends: what its rank did before and what it needs, until nothing changes any more."""
    before, ends = {}, {}
    for actions in schedule.ranks:
        for previous, action in zip((None, *actions), actions, strict=False):
            before[action], ends[action] = previous, 0.0
    while True:
        found = {}
        for action, previous in before.items():
            stage, kind, _ = action
            rank = schedule.rank_of[stage]
            start = begin[rank] if previous is None else ends[previous]
            for needed_stage, kinds in (
                ((stage - 1, "F"),) if kind == "F" else ((stage + 1, "IB"),) if kind in "IB" else ()
            ):
                for needed in (action._replace(stage=needed_stage, kind=k) for k in kinds):
                    if needed in ends:
                        away = schedule.rank_of[needed_stage] != rank
                        start = max(start, ends[needed] + (costs.send if away else 0.0))
            found[action] = start + costs.seconds(action)
        if found == ends:
            return ends
        ends = found


def test_the_simulator_agrees_with_a_naive_one():
    rng = random.Random(7)
    for _ in range(120):
        schedule = random_schedule(rng)
        check_schedule(schedule, len(schedule.ranks), schedule.stages, schedule.micro_batches)
        costs, begin = random_costs(rng, schedule.stages), [rng.uniform(0, 5) for _ in schedule.ranks]
        timeline, ends = simulate(schedule, costs, begin), naive_ends(schedule, costs, begin)
        assert timeline.ends == [[ends[action] for action in actions] for actions in schedule.ranks]
        assert timeline.busy == pytest.approx(sum(costs.seconds(action) for rank in schedule.ranks for action in rank))


def test_to_wait_for_each_others_step_never_helps_and_the_steady_state_is_one():
    """A run of many steps takes the period for each of them."""
    rng = random.Random(5)
    for gathering in ("none", "run", "micro_batch") * 10:
        schedule = random_schedule(rng)
        costs, clocks = random_costs(rng, schedule.stages), [0.0] * len(schedule.ranks)
        seconds, _ = period(schedule, costs, synchronised=False, gathering=gathering)
        assert seconds <= period(schedule, costs, gathering=gathering)[0] * (1 + 1e-9)
        reached: list[float] = []
        while len(reached) < 60:
            clocks = [ends[-1] for ends in simulate(schedule, costs, clocks, gathering).ends]
            reached.append(max(clocks))
        assert reached[-1] - reached[29] == pytest.approx(30 * seconds)


def test_activations_are_held_to_i_and_in_part_to_w():
    order = [Action(0, kind, i) for kind, i in (("F", 0), ("F", 1), ("I", 0), ("F", 2), ("W", 0), ("B", 1), ("B", 2))]
    assert peak_activations(order, uniform_costs(1, held=4.0, kept=4.0)) == 12
    assert peak_activations(order, uniform_costs(1, held=4.0, kept=1.0)) == 9
    assert peak_activations(order, uniform_costs(1, held=4.0, kept=0.0)) == 8


def test_weights_are_gathered_for_every_micro_batch_or_for_every_run():
    """Blockwise: 2 (v - 1) gathers a unit and one for the first, since a unit ends on the chunk the next begins on."""
    for shape in shapes("blockwise"):
        for order in make_schedule("blockwise", shape).ranks:
            runs = len(shape_units("blockwise", shape))
            assert len(gathers(order, "run")) == 1 + 2 * (shape.chunks - 1) * runs <= (2 * shape.chunks - 1) * runs
            assert len(gathers(order, "micro_batch")) == 2 * shape.chunks * shape.micro_batches
            assert gathers(order, "none") == []


def test_a_gather_hides_behind_the_run_before_it():
    """Only the first is waited for, as long as a run takes no less than the gather of the next."""
    schedule = make_schedule("blockwise", Shape(1, 3, 8, 4))
    for gather in (0.5, 4.0):
        timeline = simulate(schedule, uniform_costs(3, gather=gather), gathering="run")
        assert timeline.starts[0][0] == gather
        assert timeline.makespan == 3 * 3 * 8
    assert simulate(schedule, uniform_costs(3, gather=5.0), gathering="run").makespan > 3 * 3 * 8
    assert simulate(schedule, uniform_costs(3, gather=1.5), gathering="micro_batch").makespan > 3 * 3 * 8


def test_hundreds_of_stages_and_micro_batches():
    schedule = make_schedule("zb_v", Shape(100, 2, 200))
    assert simulate(schedule, uniform_costs(200)).makespan == 3 * 2 * 200 + 99


def test_ranks_that_wait_for_each_other_are_named():
    order = (
        tuple(Action(stage, kind, 0) for stage, kind in ((0, "F"), (0, "B"))),
        (Action(1, "B", 0), Action(1, "F", 0)),
    )
    assert simulate(Schedule(order), uniform_costs(2)).makespan > 0  # rank 1's own order is check_schedule's matter
    with pytest.raises(Deadlock) as deadlock:
        simulate(Schedule((order[0][::-1], order[1][::-1])), uniform_costs(2))
    assert deadlock.value.blocked == {0: 0, 1: 0}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "1f1b",
            Shape(4, 2, 8),
            "parallel.virtual_stages=2: possible is 1; with 2 go gpipe, interleaved_1f1b, zb_v, block",
        ),
        ("zb_v", Shape(4, 3, 8), "possible is 2; with 3 go gpipe, interleaved_1f1b, blockwise"),
        ("interleaved_1f1b", Shape(4, 1, 8), "possible is 2 and more; with 1 go gpipe, 1f1b, zb_h1, zb_h2, blockwise"),
        ("zb_h2", Shape(4, 1, 6), "at least 7 micro-batches a step and there are 6; .*, or one of gpipe, 1f1b"),
        ("1f1b", Shape(4, 1, 3), "at least 4 micro-batches .* or parallel.pipeline=3 or less"),
        ("blockwise", Shape(4, 2, 8, 3), "parallel.pipeline_unit=3: a unit of blockwise has from 4 .* to 8"),
        ("blockwise", Shape(4, 2, 8, 9), "parallel.pipeline_unit=9"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, message):
    for refuse in (check_shape, make_schedule):
        with pytest.raises(ValueError, match=message):
            refuse(name, shape)


def test_schedules_need_no_torch_and_only_pictures_need_matplotlib():
    modules = ", ".join(f"rowwise.parallel.pipeline_schedule.{name}" for name in PACKAGE.split())
    for imports, absent in (
        (modules, {"torch", "matplotlib"}),
        ("rowwise.parallel.pipeline_schedule.gantt", {"torch"}),
    ):
        program = f"import {imports}, sys; print(*sys.modules)"
        process = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=True)
        assert not absent & set(process.stdout.split())
