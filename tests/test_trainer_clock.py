"""Intervals by time: rank 0's clock decides, all ranks do the same, and the numbers of the run stay what they are. (Law 2.)"""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parity import small_config, with_layout
from rowwise.parallel.mesh import Workers
from rowwise.trainer import clock, step, update
from rowwise.trainer.data.batches import Prefetch
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.step import RankStatus, told_by_all
from runs import final_tensors, named, records, run_train, run_until

STEPS, STEP_SECONDS = 10, 10.0
OVERRIDES = (f"steps={STEPS}", "eval.batches=1", "checkpoint.keep=0")
BY_TIME = ("eval.every=30s", "checkpoint.every=40s")


def run_by_clock(workers: Workers, config, stop_at: int = 0) -> list[dict[str, bool]]:
    """A run whose steps take ten seconds by rank 0's clock, and any time by the others'. What each step's message said."""
    seconds, told, draw = [1000.0 * config.seed], [], random.Random(workers.rank)
    drawn, read = Prefetch.__next__, step.told_by_all

    def counted(self):
        seconds[0] += STEP_SECONDS
        return drawn(self)

    def heard(*sums):
        told.append(read(*sums))
        return told[-1]

    Prefetch.__next__ = counted  # type: ignore[method-assign]
    step.told_by_all = update.told_by_all = heard
    clock.now = lambda: seconds[0] if workers.rank == 0 else draw.uniform(0, 1e6)
    try:
        run_until(workers, config, stop_at) if stop_at else run_train(workers, config)
    finally:
        Prefetch.__next__, clock.now = drawn, clock.time.monotonic  # type: ignore[method-assign]
        step.told_by_all = update.told_by_all = read
    return told


def evaluations(run_dir: str) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in read_metrics(Path(run_dir)) if "eval_loss" in record}


def saves(run_dir: str) -> list[int]:
    return sorted(read_manifest(path)["step"] for path in complete_checkpoints(Path(run_dir) / "checkpoints"))


def assert_same_numbers(run_dir: str, other_dir: str) -> None:
    """To the last bit, the held-out loss where both evaluated."""
    assert records(run_dir) == records(other_dir)
    ours, theirs = evaluations(run_dir), evaluations(other_dir)
    assert ours == {at: theirs[at] for at in ours}
    tensors, others = final_tensors(run_dir), final_tensors(other_dir)
    assert tensors.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in tensors.items())


# name -> (options, degrees, where it evaluates, where it saves). Where the next step is begun before a step is known to be good,
# its data is drawn, and ten seconds pass, a step earlier.
LAYOUTS: dict[str, tuple] = {
    "sharded": (("batch.micro_size=12",), {"zero": 2}, [3, 6, 9, 10], [4, 8, 10]),
    "in the backward": (
        ("batch.micro_size=12", "optim.in_backward=true", "clip_norm=0"), {"zero": 3}, [3, 6, 9, 10], [4, 8, 10],
    ),
    "validated late": (
        ("batch.micro_size=12",), {"pipeline": 2, "pipeline_schedule": "zb_h1", "post_validation": True},
        [2, 5, 8, 10], [3, 7, 10],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_time_says_when_and_changes_no_number(ranks, tmp_path, name):
    options, degrees, evaluated, saved = LAYOUTS[name]
    every_step = small_config(tmp_path, *OVERRIDES, *options, "eval.every=1", "checkpoint.every=5")
    by_steps = named(with_layout(every_step, 2, **degrees), tmp_path, "by-steps")
    ranks.run(run_train, 2, by_steps)
    by_time = with_layout(small_config(tmp_path, *OVERRIDES, *options, *BY_TIME), 2, **degrees)
    told = ranks.run(run_by_clock, 2, by_time)
    assert told[0] == told[1] and len(told[0]) == STEPS
    asked = {at + 1 for at, said in enumerate(told[0]) if said["evaluate"]}
    assert asked | {STEPS} == {*evaluated}
    assert [*evaluations(by_time.run_dir)] == evaluated
    assert saves(by_time.run_dir) == saved
    assert_same_numbers(by_time.run_dir, by_steps.run_dir)


def test_the_clock_goes_on_over_a_resume(ranks, tmp_path):
    """Evaluated at step 3 and stopped after 5: next at 6. Saved when it was stopped: next four steps later."""
    base = with_layout(small_config(tmp_path, *OVERRIDES, *BY_TIME, "batch.micro_size=12"), 2, zero=1)
    stopped, whole = named(base, tmp_path, "stopped"), named(base, tmp_path, "whole")
    ranks.run(run_by_clock, 2, whole)
    ranks.run(run_by_clock, 2, stopped, 5)
    checkpoint = complete_checkpoints(Path(stopped.run_dir) / "checkpoints")[0]
    assert read_manifest(checkpoint)["clock"] == {"evaluated_seconds_ago": 2 * STEP_SECONDS}
    ranks.run(run_by_clock, 2, stopped)
    assert [*evaluations(stopped.run_dir)] == [*evaluations(whole.run_dir)] == [3, 6, 9, 10]
    assert (saves(stopped.run_dir), saves(whole.run_dir)) == ([4, 5, 9, 10], [4, 8, 10])
    assert_same_numbers(stopped.run_dir, whole.run_dir)


def test_what_the_clock_asks_for_stands_beside_any_number_of_stops(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 8192)
    for stops in (0, 1, 8191, 8192):
        for evaluate in (False, True):
            for save in (False, True):
                first, other = torch.zeros(2, 5, dtype=torch.float64)
                RankStatus(stops > 0, False, 5, evaluate, save).put(first)
                RankStatus(stops > 1, False, 5).put(other)
                sums = first + other * max(1, stops - 1)
                sums[2:4] = torch.tensor([8192 * 5, 8192 * 25])
                said = {"stop": stops > 0, "sound": True, "evaluate": evaluate, "save": save}
                assert told_by_all(*sums.tolist()).items() >= said.items()
