"""Laws 2 and 3 for adapters that begin with whole matrices, and for LQ-LoRA's codes: every layout is one process."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from parity import assert_every_layout, small_config, with_layout
from rowwise.kernels.coded_rows import decode_rows
from rowwise.parallel.mesh import Workers
from rowwise.trainer.adapters import fisher
from rowwise.trainer.adapters.bits import NAMED
from rowwise.trainer.adapters.from_data import Unbegun
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.init import random_rows
from rowwise.trainer.whole import Source, load_model, read_tensors
from runs import assert_resumes_to_the_last_bit, assert_same_run, final_tensors, named, run_train, run_until

PISSA = ("adapter=lora", "adapter.rank=3", "adapter.alpha=7", "adapter.init=pissa")
LQ = ("adapter=lq_lora", "adapter.rank=3", "adapter.alpha=7", "adapter.bits=7.3")
SOME = "adapter.layers=[*.wv.*, *.wo.*, *.w1.*, *.w2.*]"
FISHER = (*LQ, SOME, "adapter.fisher=true", "adapter.init_batches=2", "adapter.dropout=0.2")
EVA = ("adapter=lora", "adapter.rank=3", "adapter.alpha=7", "adapter.init=eva", "adapter.init_batches=2")
CORDA = (*EVA, "adapter.init=corda", "adapter.dropout=0.2")
LEAST = (*CORDA, "adapter.corda_mode=knowledge", "adapter.rslora=true")
SPLIT = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}
BOTH = {"ulysses": 2, "ring": 2, "ring_order": "zigzag"}
SHARED = ("model.heads=4", "model.kv_heads=2", "model.head_dim=6")
FOUR = ("model.layers=4", "batch.micro_size=1", "batch.global_size=8")
# Options -> the layouts on which they are tried.
CASES = {
    "pissa": ((*PISSA, *SHARED), [(2, {"zero": 0}), (4, {**BOTH, "zero": 3})]),
    "pissa in nf4, split": ((*PISSA, *FOUR, "model.frozen_dtype=nf4"), [(2, SPLIT), (4, {**SPLIT, "zero": 3})]),
    "corda": ((*CORDA, *SHARED), [(1, {}), (4, {**BOTH, "zero": 3})]),
    "corda split": ((*LEAST, *FOUR), [(2, SPLIT), (4, {**SPLIT, "zero": 3})]),
    "eva": ((*EVA, *SHARED), [(2, {"zero": 0}), (4, {**BOTH, "zero": 3})]),
    "eva in nf4, split": ((*EVA, *FOUR, "model.frozen_dtype=nf4"), [(2, SPLIT), (4, {**SPLIT, "zero": 3})]),
    "lq": ((*LQ, *SHARED), [(4, {**BOTH, "zero": 3})]),
    "lq on fewer": ((*LQ, *SHARED), [(1, {}), (2, {"zero": 0})]),
    "lq split": ((*LQ, *FOUR), [(2, SPLIT), (4, {**SPLIT, "zero": 3})]),
    "fisher": ((*FISHER, *SHARED), [(4, {**BOTH, "zero": 3})]),
    "fisher on fewer, made again": ((*FISHER, *SHARED, "memory.recompute=full"), [(1, {}), (2, {"zero": 0})]),
    "fisher split, made again": (
        (*FISHER, *FOUR, "memory.recompute=selective"), [(2, SPLIT), (4, {**SPLIT, "zero": 3})],
    ),
}  # fmt: skip
# Which stand for the others, unless --full.
NOW = ("fisher",)
NAMES = [pytest.param(name, marks=[] if name in NOW else pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("begun")


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_one_process(ranks, folder, name):
    """Every gradient, every update, every state; what is frozen stays what it was."""
    options, layouts = CASES[name]
    config = small_config(folder, *options)
    assert_every_layout(
        ranks, config, {n: with_layout(config, world, **layout) for n, (world, layout) in enumerate(layouts)}
    )


def saved_on_four_went_on_on_one(ranks, folder, *options):
    """Two steps on four ranks and two on one are four on one; returns the run."""
    steps = (*SHARED, "steps=4", "eval.every=2", "eval.batches=1")
    base = named(small_config(folder, *options, *steps), folder, "moved")
    alone = named(with_layout(base, 1), folder, "alone")
    ranks.run(run_train, 1, alone)
    ranks.run(run_until, 4, with_layout(base, 4, **BOTH, zero=3), 2)
    ranks.run(run_train, 1, with_layout(base, 1))
    assert_same_run(base.run_dir, alone.run_dir)
    return base


@pytest.mark.parametrize("options", [pytest.param(PISSA, marks=pytest.mark.full), CORDA], ids=["pissa", "corda"])
def test_what_four_ranks_took_out_of_w_goes_on_on_one(ranks, tmp_path, options):
    """W - s B A comes back, and is not W."""
    run = saved_on_four_went_on_on_one(ranks, tmp_path, *options)
    name, plain = "blocks.1.feed_forward.w1.weight", torch.empty(37, 30, dtype=torch.float64)
    random_rows(parameter_specs(run.model), run.seed)(name, plain, 0, 37)
    rest = final_tensors(run.run_dir)[f"model.{name}"]
    values = torch.linalg.svdvals(plain - rest)
    assert values[3] < 1e-9 < 0.01 < values[2]


@pytest.mark.full
@pytest.mark.parametrize("options", [LQ, FISHER], ids=["lq", "fisher"])
def test_codes_of_four_ranks_go_on_on_one(ranks, tmp_path, options):
    base = saved_on_four_went_on_on_one(ranks, tmp_path, *options)

    checkpoint = complete_checkpoints(Path(base.run_dir) / "checkpoints")[0]
    source = Source(checkpoint, read_manifest(checkpoint))
    model, forms = load_model(source, torch.device("cpu")), source.config["adapter"]["forms"]
    assert len(set(forms.values())) > 1
    for layer in ("blocks.1.feed_forward.w1", "blocks.0.attention.wv"):
        weight, form = model.get_parameter(f"{layer}.weight").double(), NAMED[forms[f"{layer}.weight"]]
        (rows, columns), f64 = weight.shape, torch.float64
        packed = torch.empty(rows, form.row_bytes(columns), dtype=torch.uint8)
        a, b = torch.empty(3, columns, dtype=f64), torch.empty(rows, 3, dtype=f64)
        parts = {"weight": packed, "lora_a": a, "lora_b": b}
        read_tensors(checkpoint, {f"model.{layer}.{key}": t for key, t in parts.items()})
        right = decode_rows(packed, columns, form, f64) + 7 / 3 * b @ a
        torch.testing.assert_close(weight, right, rtol=1e-12, atol=1e-14)


@pytest.mark.full
@pytest.mark.parametrize("options", [LQ, FISHER, PISSA, CORDA, EVA], ids=["lq", "fisher", "pissa", "corda", "eva"])
def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, tmp_path, options):
    """What it began with is read in the checkpoint, and not found again."""
    config = with_layout(small_config(tmp_path, *options, *FOUR, "steps=4"), 2, **SPLIT)
    assert_resumes_to_the_last_bit(ranks, 2, config, tmp_path, stop_at=2)


def test_data_that_says_too_little_is_refused_on_every_rank(ranks, tmp_path):
    few = ("adapter.rank=9", "adapter.init_batches=1", "batch.global_size=2", "batch.micro_size=1", "batch.seq_len=4")
    told = ranks.run(refused, 2, with_layout(small_config(tmp_path, *EVA, *few), 2))
    assert told[0] == told[1]
    assert re.fullmatch(
        r"adapter.init=eva: blocks.0.attention.wq: what it takes for \d tokens varies in [1-7] directions, and adapter.rank=9; give "
        r"more than adapter.init_batches=1, data in which more has a label, or adapter.init=kaiming",
        told[0],
    )


def test_gradients_that_say_nothing_are_refused_on_every_rank(ranks, tmp_path):
    told = ranks.run(refused_without_gradients, 2, with_layout(small_config(tmp_path, *FISHER), 2))
    assert told[0] == told[1]
    assert told[0].startswith(
        "adapter.fisher: blocks.0.attention.wv: its gradients are zero, or not finite; give more than adapter.init_batches=2, data"
    )


def refused_without_gradients(workers: Workers, config: TrainConfig) -> str:
    with mock.patch.object(fisher, "add_step_"):
        return refused(workers, config)


def refused(workers: Workers, config: TrainConfig) -> str:
    with pytest.raises(Unbegun) as refusal:
        run_train(workers, config)
    return str(refusal.value)
