"""Pipeline schedules as files: CSV that torch reads and writes too, refusals that name the line, and the cut of a model."""

import random
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as theirs

from rowwise.parallel.pipeline_schedule.check import check_schedule
from rowwise.parallel.pipeline_schedule.cut import balance
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Action, leading_forwards, read_csv, write_csv


@pytest.mark.parametrize("name", GENERATORS)
def test_csv_comes_back_as_it_went(name, tmp_path):
    path = tmp_path / "schedule.csv"
    schedule = make_schedule(name, Shape(3, GENERATORS[name].chunks[0], 7, 3))
    write_csv(schedule, path)
    again = read_csv(path)
    assert (again.ranks, again.source, again.lines) == (schedule.ranks, str(path), (1, 2, 3))


def test_empty_cells_and_lines_are_nothing_and_lines_are_counted_in_the_file(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text(",0F0, 0F1 ,,0B0,0B1\n\n1F0,1F1,1B0,1B1,\n")
    schedule = read_csv(path)
    assert schedule.lines == (1, 3)
    assert schedule.ranks[0] == (Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 0), Action(0, "B", 1))
    assert schedule.stages_of(1) == [1]


def their_schedule(cls: type, ranks: int, chunks: int, micro_batches: int):
    """A schedule of torch's on stages that have only their places, which is all that its order depends on."""
    stages = [
        SimpleNamespace(
            num_stages=ranks * chunks, group_size=ranks, group_rank=0, stage_index=i, submod=None, is_last=False
        )
        for i in range(0, ranks * chunks, ranks)
    ]
    return cls(stages, micro_batches, loss_fn=lambda output, target: output)


@pytest.mark.parametrize(
    ("cls", "ours"),
    [
        (theirs.ScheduleInterleaved1F1B, "interleaved_1f1b"),
        (theirs.ScheduleZBVZeroBubble, "zb_v"),
        (theirs.ScheduleInterleavedZeroBubble, None),
        (theirs.ScheduleLoopedBFS, None),
    ],
)
def test_what_torch_writes_is_read_and_is_the_schedule_of_that_name(cls, ours, tmp_path):
    path = tmp_path / "theirs.csv"
    for ranks, micro_batches in ((2, 4), (3, 9), (4, 8), (4, 15)):
        their_schedule(cls, ranks, 2, micro_batches)._dump_csv(path, format="compute_only")
        schedule = read_csv(path)
        check_schedule(schedule, ranks, 2 * ranks, micro_batches)
        if ours:
            assert schedule.ranks == make_schedule(ours, Shape(ranks, 2, micro_batches)).ranks


@pytest.mark.parametrize("name", GENERATORS)
def test_torch_reads_what_we_write(name, tmp_path):
    path = tmp_path / "ours.csv"
    chunks = GENERATORS[name].chunks[0]
    schedule = make_schedule(name, Shape(4, chunks, 12, 6))
    write_csv(schedule, path)
    runtime = their_schedule(theirs._PipelineScheduleRuntime, 4, chunks, 12)
    runtime._load_csv(path)  # torch checks it, too, and adds its messages
    read = [tuple(map(str, runtime.pipeline_order[rank])) for rank in range(4)]
    assert read == [tuple(map(str, actions)) for actions in schedule.ranks]
    assert runtime.stage_index_to_group_rank == schedule.rank_of


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0,2X0,1B0\n", "line 2: '2X0' is no action; write stage, one of F, I, W, B, micro-batch"),
        ("0F0,0SEND_F0,0B0\n", "line 1: '0SEND_F0' is no action; .*messages and gathers follow from the order"),
        ("0F0,-1B0\n", "line 1: '-1B0' is no action"),
        ("0f0\n", "line 1: '0f0' is no action"),
        ("", "holds no actions; a line holds those of one rank"),
        ("\n,,\n\n", "holds no actions"),
        (None, "No such file or directory.*; give a name or a CSV file that exists"),
    ],
)
def test_files_that_hold_no_schedule_are_refused(text, message, tmp_path):
    path = tmp_path / "schedule.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_csv(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0,0F1,0B1", " has 1 lines for parallel.pipeline=2"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n2F0", " has 3 lines for parallel.pipeline=2"),
        ("0F0,0B0,0F1,0B1\n,", " names stages [0]; parallel.pipeline x parallel.virtual_stages = 2 asks for 0 to 1"),
        ("0F0,0B0,0F1,0B1\n2F0,2B0,2F1,2B1", " names stages [0, 2]; parallel.pipeline x"),
        ("0F0,0B0,0F1,0B1,1F0,1B0\n,", ", line 2 is empty: every rank has work"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,0F1,1F1,1B1", ", line 2: 0F1 is of stage 0, which "),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1F1,1B1", ", line 2: 1F1 stands there 2 times"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1,1F2,1B2", ", line 2: 1F2 is beyond the 2 micro-batches of a step"),
        ("0F0,0B0,0B1\n1F0,1B0,1F1,1B1", ", line 1: 0F1 is missing"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,1F1", ", line 2: stage 1, micro-batch 1 wants either B, or I and W"),
        ("0F0,0B0,0F1,0I1\n1F0,1B0,1F1,1B1", ", line 1: stage 0, micro-batch 1 wants either B, or I and W"),
        ("0F0,0B0,0F1,0W1\n1F0,1B0,1F1,1B1", ", line 1: stage 0, micro-batch 1 wants either B, or I and W"),
        ("0F0,0B0,0F1,0I1,0W1,0B1\n1F0,1B0,1F1,1B1", ", line 1: stage 0, micro-batch 1 wants either B, or I and W"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1W1,1I1", ", line 2: 1W1 stands before 1I1, which it needs"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0,1B1,1F1", ", line 2: 1B1 stands before 1F1, which it needs"),
    ],
)
def test_schedules_that_cannot_be_carried_out_are_refused_with_their_line(text, message, tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as refusal:
        check_schedule(read_csv(path), 2, 2, 2)
    assert str(refusal.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("lines", "circle"),
    [
        (
            ["0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"],
            [
                "line 1 stops at 0B0, which waits for I or B of stage 1",
                "line 2 stops at 1F1, which waits for F of stage 0",
            ],
        ),
        (
            ["0F0,0B0,0F1,0B1", "1F0,1B0,1F1,1B1", "2F0,2F1,2B0,2B1", "3F0,3F1,3B0,3B1"],
            [
                "line 1 stops at 0B0, which waits for I or B of stage 1",
                "line 2 stops at 1B0, which waits for I or B of stage 2",
                "line 3 stops at 2F1, which waits for F of stage 1",
            ],
        ),
    ],
    ids=["two", "three, and a fourth that waits for them"],
)
def test_a_circle_is_told_rank_by_rank(lines, circle, tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError) as refusal:
        check_schedule(read_csv(path), len(lines), len(lines), 2)
    told = "; ".join(f"{path}, {entry}" for entry in circle)
    assert str(refusal.value) == f"the ranks wait for each other in a circle: {told}"


def cuts(layers: int, stages: int):
    """All of them: where each stage begins and ends."""
    for middle in combinations(range(1, layers), stages - 1):
        bounds = (0, *middle, layers)
        yield [range(a, b) for a, b in pairwise(bounds)]


def stage_costs(first: float, layers: list[float], last: float, cut: list[range]) -> list[float]:
    costs = [sum(layers[i] for i in stage) for stage in cut]
    costs[0] += first
    costs[-1] += last
    return costs


def test_the_cut_is_the_best_of_all_contiguous_ones():
    """Whole costs, so that sums are exact: the dearest stage first, then the squares."""
    rng = random.Random(3)
    for _ in range(300):
        count = rng.randint(1, 9)
        layers = [float(rng.randint(1, 12)) for _ in range(count)]
        first, last, stages = float(rng.randint(0, 20)), float(rng.randint(0, 20)), rng.randint(1, count)

        def worth(cut, costs=(first, layers, last)):
            found = stage_costs(*costs, cut)
            return max(found), sum(cost**2 for cost in found)

        cut = balance(first, layers, last, stages)
        assert [i for stage in cut for i in stage] == list(range(count))
        assert len(cut) == stages and all(cut)
        assert worth(cut) == min(map(worth, cuts(count, stages)))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"5 pipeline stages .* model.layers=4: .* at most 4 stages"):
        balance(1.0, [1.0] * 4, 1.0, 5)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_leading_forwards_need_nothing_but_each_other_and_are_as_many_as_can_be(name, ranks):
    chunks = GENERATORS[name].chunks[0]
    schedule = make_schedule(name, Shape(ranks, chunks, 2 * ranks, ranks))
    counts = leading_forwards(schedule)
    done = {action for actions, count in zip(schedule.ranks, counts, strict=True) for action in actions[:count]}

    def possible(action: Action) -> bool:
        return action.kind == "F" and (action.stage == 0 or action._replace(stage=action.stage - 1) in done)

    assert all(possible(action) for action in done)
    following = [actions[count] for actions, count in zip(schedule.ranks, counts, strict=True)]
    assert not any(possible(action) for action in following)
    assert all(count > 0 for count in counts)
