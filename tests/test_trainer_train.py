"""Laws 2 and 3 for whole runs: stopped and resumed, on the same layout and on others; the precisions; what is logged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import TOLERANCE, relative_error, small_config, with_layout
from ranks import RankFailure
from rowwise.kernels.rows import local
from rowwise.optim.optimizer import Optimizer
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import read_metrics
from runs import final_tensors, named, records, run_train, run_until

STEPS = 6
OVERRIDES = (f"steps={STEPS}", "schedule=cosine", "schedule.warmup_steps=3", "eval.every=2", "eval.batches=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


def run_config(folder, name, world, *options, count=1, **degrees):
    """The run of these tests under another name, with so many micro-batches a rank."""
    config = small_config(folder, *OVERRIDES, f"batch.micro_size={24 // world // count}", *options)
    return named(with_layout(config, world, **degrees), folder, name)


@pytest.fixture(scope="module")
def uninterrupted(ranks, folder):
    """Six steps on two ranks, of two micro-batches each, never stopped."""
    config = run_config(folder, "uninterrupted", 2, "checkpoint.every=2", count=2, zero=2)
    states = ranks.run(run_train, 2, config)
    assert states[0] == states[1]
    assert states[0].step == STEPS
    return config


def test_three_and_three_are_six_bit_for_bit(ranks, folder, uninterrupted):
    config = named(uninterrupted, folder, "stopped")
    for state in ranks.run(run_until, 2, config, 3):
        assert state.step == 3
    ranks.run(run_train, 2, config)
    assert records(config.run_dir) == records(uninterrupted.run_dir)
    theirs, ours = final_tensors(uninterrupted.run_dir), final_tensors(config.run_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


LAYOUTS = {
    "4 ranks": (4, {"zero": 3}), "3": (3, {"zero": 1}), "1": (1, {"zero": 0}), "2x2": (4, {"zero": 2, "replicate": 2}),
    "stage 0 on 4": (4, {"zero": 0, "replicate": 2}), "stage 3 on 2": (2, {"zero": 3}),
}  # fmt: skip
ROADS = [[*LAYOUTS], ["4 ranks", "3"], ["3", "1"], ["1", "2x2"], ["stage 0 on 4", "stage 3 on 2"]]


@pytest.mark.parametrize(
    "road", [pytest.param(road, marks=pytest.mark.full) if len(road) == 2 else road for road in ROADS], ids=" to ".join
)
def test_a_run_goes_on_on_another_layout(ranks, folder, uninterrupted, road):
    """As many steps on each; its held-out losses are the same too, wherever they were found."""
    for number, layout in enumerate(road, 1):
        world, degrees = LAYOUTS[layout]
        config = run_config(folder, f"moved-{'-'.join(road)}", world, **degrees)
        last = number == len(road)
        ranks.run(run_until, world, config, STEPS + 1 if last else STEPS * number // len(road))
    ours, theirs = np.array(records(config.run_dir)), np.array(records(uninterrupted.run_dir))
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)
    evaluated = [
        [r["eval_loss"] for r in read_metrics(Path(c.run_dir)) if "eval_loss" in r] for c in (config, uninterrupted)
    ]
    assert len(evaluated[0]) == STEPS // 2
    np.testing.assert_allclose(*evaluated, rtol=TOLERANCE)
    reference = final_tensors(uninterrupted.run_dir)
    for key, tensor in final_tensors(config.run_dir).items():
        assert relative_error(tensor, reference[key]) <= TOLERANCE, key


def test_the_record_of_a_step_and_the_manifest(uninterrupted):
    lines = read_metrics(Path(uninterrupted.run_dir))
    assert [record["step"] for record in lines] == list(range(1, STEPS + 1))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "step_seconds", "data_seconds"}
    assert keys | {"peak_memory_bytes"} <= lines[0].keys()
    assert [record["step"] for record in lines if "eval_loss" in record] == [2, 4, 6]
    assert [record["step"] for record in lines if record.get("eval_seconds", 0) > 0] == [2, 4, 6]
    assert [record["step"] for record in lines if record.get("save_seconds", 0) > 0] == [3, 5]  # after the saves
    assert lines[-1]["loss"] < lines[0]["loss"]
    checkpoint = Path(uninterrupted.run_dir) / "checkpoints" / f"step-{STEPS:08d}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == STEPS
    assert manifest["tokens"] == STEPS * 24 * 13
    assert manifest["layout"]["world_size"] == 2
    assert {"config", "data"} == manifest["fingerprint"].keys()
    assert set(manifest["files"]) == {p.name for p in checkpoint.iterdir()} - {"manifest.json"}


def test_a_complete_run_is_left_as_it_is(ranks, folder, uninterrupted):
    before = (Path(uninterrupted.run_dir) / "metrics.jsonl").read_bytes()
    assert all(state.step == STEPS for state in ranks.run(run_train, 2, uninterrupted))
    assert (Path(uninterrupted.run_dir) / "metrics.jsonl").read_bytes() == before


def test_only_the_newest_checkpoints_stay(ranks, folder):
    config = named(small_config(folder, "steps=6", "checkpoint.every=2", "checkpoint.keep=2"), folder, "pruned")
    ranks.run(run_train, 2, with_layout(config, 2))
    assert sorted(p.name for p in (folder / "pruned/checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize(
    "layouts",
    [[(1, 0), (3, 0), (3, 3)], *(pytest.param([(1, z), (3, z)], marks=pytest.mark.full) for z in (1, 2))],
    ids=str,
)
def test_fp16_skips_an_overflow_everywhere_and_counts_it(ranks, folder, layouts):
    options = ("precision=fp16", "precision.initial_scale=4194304.0", "precision.growth_every=1000", "steps=8")
    counts = []
    for world, zero in layouts:
        config = named(with_layout(small_config(folder, *options), world, zero=zero), folder, f"fp16-{zero}-{world}")
        states = ranks.run(run_train, world, config)
        assert all(state == states[0] for state in states)
        lines = read_metrics(Path(config.run_dir))
        skipped = [record for record in lines if record["grad_norm"] is None]
        assert 0 < len(skipped) == states[0].loss_scale.skipped < len(lines)
        assert states[0].updates == len(lines) - len(skipped)
        assert lines[0]["loss_scale"] / lines[-1]["loss_scale"] == 2 ** len(skipped)
        # What was skipped changed nothing: the same first loss-bearing weights serve the next step.
        assert lines[-1]["loss"] < lines[0]["loss"]
        counts.append(len(skipped))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_other_precisions_stay_near_float64(ranks, folder, uninterrupted, precision):
    options = (f"precision={precision}", *(["precision.initial_scale=1024.0"] if precision == "fp16" else []))
    config = run_config(folder, precision, 2, *options, zero=3)
    ranks.run(run_train, 2, config)
    ours, theirs = (np.array([r["loss"] for r in read_metrics(Path(c.run_dir))]) for c in (config, uninterrupted))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4 if precision == "fp32" else 3e-2)
    assert all(tensor.dtype == torch.float32 for tensor in final_tensors(config.run_dir).values())


def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_spoilt(ranks, folder):
    config = named(small_config(folder, "optim.lr=1e200", "steps=5", "clip_norm=0"), folder, "nan")
    with pytest.raises(
        RankFailure, match=r"step 2: the gradient norm is not a number .*; the weights are finite, as they were"
    ):
        ranks.run(run_train, 2, with_layout(config, 2))


def spoilt(workers, config, step):
    """A run in which, on the last rank, a weight of its rows becomes NaN in the update of `step`."""
    original, updates = Optimizer.step, iter(range(1, config.steps + 1))

    def spoil(self, closure=None):
        original(self)
        if next(updates) == step and workers.rank == workers.world_size - 1:
            local(self.param_groups[0]["params"][-1].detach()).view(-1)[0] = math.nan

    Optimizer.step = spoil
    try:
        return run_train(workers, config)
    finally:
        Optimizer.step = original


@pytest.mark.parametrize(
    ("background", "step", "said"),
    [
        ("true", 4, r"after step 4 weights are not finite \([\w.]+\); that step is not saved"),
        ("false", 6, r"after step 6 weights are not finite"),
        (
            "true",
            3,
            r"step 4: the gradient norm is not a number .*; weights are not finite \(\S+\) since the update of step 3",
        ),
    ],
    ids=["on the way", "at the end", "between saves"],
)
def test_weights_that_are_not_finite_are_never_saved(ranks, folder, background, step, said):
    """The run ends in words, and its newest checkpoint is sound; where the next step comes first, that names the update."""
    options = ["steps=6", "checkpoint.every=2", f"checkpoint.background={background}"]
    config = named(with_layout(small_config(folder, *options), 2, zero=1), folder, f"spoilt-{step}")
    with pytest.raises(RankFailure, match=said):
        ranks.run(spoilt, 2, config, step)
    newest = complete_checkpoints(Path(config.run_dir) / "checkpoints")[0]
    assert newest.name == f"step-0000000{(step - 1) // 2 * 2}"
    assert all(tensor.isfinite().all() for tensor in final_tensors(config.run_dir).values())
    assert not list(newest.parent.glob("*.incomplete"))


def different_data(workers, config):
    """Rank 1 has another file under the same name."""
    if workers.rank == 1:
        path = Path(config.data.files[0]).with_name("other.bin")
        path.write_bytes(Path(config.data.files[0]).read_bytes()[2:])
        config = replace(config, data=replace(config.data, files=[str(path)]))
    return run_train(workers, config)


def test_ranks_that_read_different_data_are_stopped(ranks, folder):
    config = named(with_layout(small_config(folder, "steps=2"), 2), folder, "different")
    with pytest.raises(RankFailure, match=r"ranks \[1\] read other data than rank 0"):
        ranks.run(different_data, 2, config)


def test_fp16_gives_up_where_no_smaller_scale_can_help(ranks, folder):
    options = ("precision=fp16", "precision.initial_scale=4.0", "optim.lr=1e9", "steps=30", "clip_norm=0")
    with pytest.raises(RankFailure, match="FloatingPointError"):
        ranks.run(run_train, 1, named(with_layout(small_config(folder, *options), 1), folder, "hopeless"))


@pytest.mark.slow  # by inductor; by aot_eager: test_trainer_sequence
def test_compiled_blocks_give_the_same_run(ranks, folder, uninterrupted):
    config = run_config(folder, "compiled", 1, "compile=true", zero=2)
    ranks.run(run_train, 1, config)
    np.testing.assert_allclose(
        np.array(records(config.run_dir)), np.array(records(uninterrupted.run_dir)), rtol=TOLERANCE
    )
