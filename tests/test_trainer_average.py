"""The average of the weights: its formula is torch's own, laws 2 and 3, and what of a run computes with it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parity import TOLERANCE, assert_same, relative_error, run_layout, run_plain, small_config, with_layout
from rowwise.launch.evaluate import EvaluateConfig, evaluate
from rowwise.launch.runs import open_run
from rowwise.optim.average import Average, AverageConfig
from rowwise.trainer.metrics import read_metrics
from runs import assert_resumes_to_the_last_bit, assert_same_run, final_tensors, named, run_said, run_train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

AVERAGED = "average.ema=0.6"
LAYOUTS = {
    "ZeRO 3": (3, {"zero": 3}, []),
    "stages, steps at once": (2, {"pipeline": 2, "pipeline_schedule": "zb_h1", "post_validation": True},
                              ["model.tie_embeddings=true"]),
    "a ring, in the backward": (2, {"ring": 2, "zero": 1}, ["optim.in_backward=true", "clip_norm=0", "batch.micro_size=24"]),
    "masks, always the same share": (2, {"zero": 2}, ["sparsity=static", "average.warmup=false"]),
}  # fmt: skip


# tests/test_composition.py has masks, and an update in the backward over a ring.
LAYOUTS_NOW = [pytest.param(n, marks=pytest.mark.full) if "masks" in n or "backward" in n else n for n in LAYOUTS]


def configured(folder: Path, *words: str):
    more = ["steps=4", "eval.every=2", "eval.batches=1", "checkpoint.every=1", "checkpoint.keep=0", AVERAGED]
    return small_config(folder, *more, *words)


@pytest.mark.parametrize("layout", LAYOUTS_NOW)
def test_every_layout_has_the_average_of_one_process(ranks, tmp_path, layout):
    world, degrees, words = LAYOUTS[layout]
    config = with_layout(small_config(tmp_path, AVERAGED, *words), world, **degrees)
    trace, reference = ranks.run(run_layout, world, config)[0], run_plain(config)
    averages = [key for key in reference.states[-1] if key.startswith("average.")]
    assert len(averages) == len(reference.updates[0]), "every parameter has one"
    if config.optim.in_backward:
        trace.gradients = reference.gradients  # its own are gone
    assert_same(trace, reference)


@pytest.mark.parametrize(
    "words", [["optim.param_dtype=bf16", "precision=bf16", "batch.micro_size=12"], []], ids=["bf16 weights", "fp64"]
)
def test_an_average_in_16_bits_is_rounded_as_one_process_rounds(ranks, tmp_path, words):
    """Of what the rounding draws nothing depends on the layout; and what a move adds is not lost, as it would be to nearest."""
    config = small_config(
        tmp_path, "steps=3", "average.ema=0.998", "average.dtype=bf16", "average.warmup=false", *words
    )
    exact = small_config(tmp_path, "steps=3", "average.ema=0.998", "average.warmup=false", *words)
    rows = named(with_layout(config, 2, zero=3), tmp_path, "rows")
    whole, wide = (named(with_layout(one, 1), tmp_path, name) for one, name in ((config, "whole"), (exact, "wide")))
    ranks.run(run_train, 2, rows)
    for one in (whole, wide):
        ranks.run(run_train, 1, one)
    ours, theirs, right = (final_tensors(one.run_dir) for one in (rows, whole, wide))
    moved = []
    for name in (name for name in right if name.startswith("average.")):
        if not words:  # of weights that are the same to the last bits but few
            assert (ours[name] != theirs[name]).float().mean() < 0.01, name
        assert ours[name].dtype == torch.bfloat16 != right[name].dtype
        moved.append((theirs[name].double() - right[name]).mean() / right[name].abs().mean())
    assert abs(float(np.mean(moved))) < 1e-3


def test_it_is_torchs_own():
    """With one share throughout; its AveragedModel takes the first model whole, and has done so here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    ours = Average(model, AverageConfig(0.9, every=2, warmup=False), seed=0)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.n_averaged += 1
    for update in range(1, 7):
        for p in model.parameters():
            p.data.add_(torch.randn_like(p))
        ours.move(update)
        if update % 2 == 0:
            theirs.update_parameters(model)
    with ours.in_place():
        for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kept", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_average_are_what_they_were_once_it_was_in_place(kept, dtype):
    model = nn.Linear(5, 7).to(dtype)
    average = Average(model, AverageConfig(0.9, dtype=kept, warmup=False), seed=0)
    model.weight.data.mul_(1.1)
    average.move(1)
    weights, means = copy.deepcopy(model.state_dict()), copy.deepcopy(average.named_state())
    with average.in_place():
        assert torch.equal(model.weight, means["average.weight"].to(dtype))
        assert not torch.equal(model.weight, weights["weight"])
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, means[name]) for name, t in average.named_state().items())


def test_a_share_grows_to_what_is_asked():
    config = AverageConfig(0.9)
    assert [config.kept(update) for update in (1, 2, 11, 80, 81, 10_000)] == [0.1, 2 / 11, 0.55, 80 / 89, 0.9, 0.9]


def test_it_is_evaluated_saved_and_gone_on_with(ranks, tmp_path):
    """On one process and elsewhere; `rowwise evaluate` finds what the run recorded, and other losses of the last step's weights."""
    config = configured(tmp_path)
    whole, moved = named(with_layout(config, 1), tmp_path, "whole"), tmp_path / "moved"
    ranks.run(run_train, 1, whole)
    half = {"steps": 2}
    first = named(
        with_layout(configured(tmp_path, *(f"{key}={value}" for key, value in half.items())), 1), tmp_path, "moved"
    )
    ranks.run(run_train, 1, first)
    ranks.run(run_train, 2, named(with_layout(config, 2, zero=3), tmp_path, "moved"))
    assert_same_run(str(moved), whole.run_dir)
    recorded = [record["eval_loss"] for record in read_metrics(moved) if "eval_loss" in record]
    rows = evaluate(EvaluateConfig(run=str(moved), steps="2,4"))
    np.testing.assert_allclose([row.loss for row in rows], recorded, rtol=TOLERANCE)
    assert [row.recorded_loss for row in rows] == recorded
    last = evaluate(EvaluateConfig(run=str(moved), steps="2,4", weights="last"))
    assert [row.recorded_loss for row in last] == [None, None]
    assert all(abs(a.loss - b.loss) > 1e-4 for a, b in zip(rows, last, strict=True)), "the average is another model"
    tensors = final_tensors(moved)
    for weights, kind in (("last", "model"), (None, "average")):
        model = open_run(moved).model(weights=weights)
        for name, p in model.named_parameters():
            assert torch.equal(p, tensors[f"{kind}.{name}"]), (weights, name)


def test_it_resumes_to_the_last_bit(ranks, tmp_path):
    config = with_layout(configured(tmp_path, "average.dtype=bf16", "average.every=2"), 2, zero=2)
    assert_resumes_to_the_last_bit(ranks, 2, config, tmp_path, 3)


def test_it_begins_with_the_weights_of_a_checkpoint_that_has_none(ranks, tmp_path):
    """And a run that keeps it no longer goes on without."""
    plain = with_layout(configured(tmp_path, "steps=2", "average.ema=null"), 1)
    ranks.run(run_train, 1, plain)
    begun = final_tensors(plain.run_dir)
    said = ranks.run(run_said, 1, with_layout(configured(tmp_path, "steps=3", "average.warmup=false"), 1))[0]
    assert "average.ema begins anew, with the weights of the checkpoint, which has no average of them" in said
    tensors = final_tensors(plain.run_dir)
    for name in (name.removeprefix("model.") for name in begun if name.startswith("model.")):
        expected = 0.6 * begun[f"model.{name}"] + 0.4 * tensors[f"model.{name}"]
        assert relative_error(tensors[f"average.{name}"], expected) < TOLERANCE
    ranks.run(run_train, 1, with_layout(configured(tmp_path, "average.ema=null"), 1))
    assert not any(name.startswith("average.") for name in final_tensors(plain.run_dir))
    with pytest.raises(
        ValueError, match=r"weights=average: at step 4 the run kept none \(average.ema=null\); give weights=last"
    ):
        evaluate(EvaluateConfig(run=plain.run_dir, weights="average"))
