"""The learning-rate range test: what a curve shows, when it is over, and a run that ends by itself, on every layout. (Law 2.)"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.launch.pages.page import page
from rowwise.launch.report import read_runs
from rowwise.optim.lr_schedules import LrRange, check_schedule
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.begin import range_test as range_test_of
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.lr_range import averaged, find, points_of, verdict
from rowwise.trainer.metrics import read_metrics
from runs import records, run_said, run_train, run_until

RATES = [10 ** (-6 + 6 * i / 99) for i in range(100)]


def curve(rate):
    """Falls around 1e-3, is lowest near 1e-2 and climbs beyond."""
    return 5 - 3 / (1 + (1e-3 / rate) ** 2) + (rate / 5e-2) ** 2


def test_the_rate_rises_by_equal_factors_or_differences():
    exponential, linear = LrRange(start=1e-4), LrRange(start=0.2, growth="linear")
    assert [exponential.factor(t, 5) for t in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert [linear.factor(t, 5) for t in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    with pytest.raises(ValueError, match=r"start=1.0: the share of optim.lr that the rate rises from"):
        check_schedule(LrRange(start=1.0), 5)


def test_smoothing_has_no_bias_at_its_start():
    assert averaged([3.0] * 9).means == pytest.approx([3.0] * 9)
    assert averaged([1.0, 2.0]).means == pytest.approx([1.0, (0.8 * 1 + 2) / 1.8])


def test_the_suggestion_is_below_where_the_loss_is_lowest_and_the_test_is_over_where_it_blows_up():
    losses = [curve(rate) for rate in RATES]
    end = next(n for n in range(1, 101) if averaged(losses[:n]).blown_up)
    finding = find(list(zip(RATES[:end], losses[:end], strict=True)))
    assert finding.suggested == pytest.approx(finding.lowest / 3, rel=0.05)
    assert 2e-3 < finding.lowest < 2e-2 < finding.blow_up < 2e-1
    assert f"train with optim.lr={finding.suggested:g}," in verdict(list(zip(RATES[:end], losses[:end], strict=True)))


def test_what_is_not_over_says_so_and_what_never_fell_too():
    fallen = [(rate, curve(rate)) for rate in RATES if rate < 1e-2]
    assert find(fallen).blow_up is None
    assert "had not blown up at 0.0087: raise optim.lr" in verdict(fallen)
    assert "the loss fell at no rate from 1e-06 to 1; begin lower" in verdict([(rate, 5 + rate) for rate in RATES])
    assert not averaged([]).blown_up
    assert averaged([5.0, math.inf]).blown_up


def test_steps_that_say_nothing_are_passed_over():
    made = [
        {"lr": 1.0, "loss": 2.0, "grad_norm": 1.0},
        {"lr": 2.0, "loss": None, "grad_norm": 0.0},  # without tokens
        {"lr": 3.0, "loss": None, "grad_norm": None, "loss_scale": 4.0},  # an overflow of fp16
        {"lr": 4.0, "loss": None, "grad_norm": None, "loss_scale": 1.0},
        {"lr": 5.0, "loss": 9.0, "grad_norm": None},
        {"loss": 9.0},  # damaged
    ]
    assert points_of(made) == [(1.0, 2.0), (4.0, math.inf), (5.0, math.inf)]


def range_test(folder, *overrides):
    base = (
        "schedule=lr_range",
        "schedule.start=1e-4",
        "steps=30",
        "optim.lr=100",
        "clip_norm=0",
        "batch.micro_size=12",
    )
    return small_config(folder, *base, *overrides)


def test_a_test_ends_by_itself_alike_on_every_layout_and_after_a_stop(ranks, tmp_path):
    alone = with_layout(replace(range_test(tmp_path), run_dir=str(tmp_path / "alone")), 1)
    (said,) = ranks.run(run_said, 1, alone)
    made = records(alone.run_dir)
    assert 10 < len(made) < 30
    assert said.strip().splitlines()[-1] == verdict(points_of(read_metrics(Path(alone.run_dir))))
    split = with_layout(replace(range_test(tmp_path), run_dir=str(tmp_path / "split")), 2, zero=3)
    ranks.run(run_until, 2, split, 6)
    ranks.run(run_train, 2, split)
    assert len(records(split.run_dir)) == len(made)
    # Once more, and it is still over.
    ranks.run(run_train, 2, split)
    assert len(records(split.run_dir)) == len(made)
    content = page(read_runs([Path(alone.run_dir)])[0])
    assert "Learning-rate range test" in content
    assert "train with optim.lr=" in content


def test_a_loss_that_is_no_number_ends_the_test_and_fails_no_run(ranks, tmp_path):
    config = with_layout(range_test(tmp_path, "optim.lr=1e200", "schedule.start=1e-10", "steps=5"), 1)
    ranks.run(run_said, 1, config)
    last = read_metrics(Path(config.run_dir))[-1]
    assert last["step"] < 5 and last["grad_norm"] is None


def resumed_test(workers: Workers, config):
    """The points of a test that goes on, where only rank 0 finds its records: a disk of a network may show them late."""
    if workers.rank:
        config = replace(config, run_dir=config.run_dir + "-elsewhere")
    mesh = make_mesh(config.parallel, workers)
    try:
        return range_test_of(config, mesh, 3)._points
    finally:
        dist.destroy_process_group()


def test_every_rank_goes_on_with_the_same_points(ranks, tmp_path):
    config = with_layout(range_test(tmp_path), 2)
    Path(config.run_dir).mkdir(parents=True)
    lines = [json.dumps({"step": n, "lr": n / 10, "loss": 1 / n, "grad_norm": 1.0}) for n in range(1, 6)]
    (Path(config.run_dir) / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    assert ranks.run(resumed_test, 2, config) == [[(0.1, 1.0), (0.2, 0.5), (0.3, 1 / 3)]] * 2


def test_the_experiment_is_a_test():
    config = config_from_tree(compose_tree(["experiment=lr_range"]))
    assert isinstance(config.schedule, LrRange)
    assert config.optim.lr == 1.0
