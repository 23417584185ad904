"""Whole sparse runs: moved between layouts, stopped and resumed, counted in metrics.jsonl, and what a resume refuses. (Law 3.)"""

from dataclasses import replace

import pytest
import torch

from parity import in_micro_batches, small_config, with_layout
from rowwise.optim.sparse.masks import count, unpack
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import flops_per_token, parameter_specs
from rowwise.trainer.prepare import prepare
from rowwise.trainer.resume import state_facts
from runs import assert_resumes_to_the_last_bit, assert_same_run, final_tensors, named, run_train, run_until

SHAPE = (
    "model.dim=32", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=44", "batch.global_size=12", "batch.micro_size=1",
    "batch.seq_len=12",
    "steps=12", "eval.every=4", "eval.batches=2",
)  # fmt: skip
METHODS = {
    "set": ["sparsity=set", "sparsity.update_every=2", "sparsity.growth=unfired"],
    "rigl": ["sparsity=rigl", "sparsity.update_every=2", "sparsity.redistribute=true"],
    "srigl": ["sparsity=srigl", "sparsity.update_every=2", "sparsity.start_at=2", "sparsity.ablate_below=0.6"],
    "gradual": ["sparsity=gradual", "sparsity.update_every=2", "sparsity.start_at=1"],
    "st3": ["sparsity=st3", "sparsity.account_every=3", "sparsity.update_every=3"],
    "pdp": ["sparsity=pdp", "sparsity.start_at=2", "sparsity.temperature=0.01", "sparsity.account_every=4"],
    "pdp_rows": ["sparsity=pdp_rows", "sparsity.start_at=2", "sparsity.temperature=0.3", "sparsity.account_every=4"],
    "pdp_nm": ["sparsity=pdp_nm", "sparsity.start_at=2", "sparsity.temperature=0.01", "sparsity.account_every=4"],
    "nm": ["sparsity=nm", "sparsity.account_every=4"],
}
STOPS = [
    (4, {"zero": 3}, 3),
    (3, {"zero": 1}, 5),
    (4, {"pipeline": 2, "zero": 2}, 7),
    (4, {"ulysses": 2, "replicate": 2, "zero": 1}, 10),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sparse-runs")


def config_of(method: str, folder, *more: str):
    return small_config(folder, *SHAPE, *METHODS[method], *more)


def on(config, world: int, **degrees):
    """On a layout, with a micro-batch a stage."""
    return in_micro_batches(with_layout(config, world, **degrees), degrees.get("pipeline", 1))


def hidden(config) -> dict[str, torch.Size]:
    return {
        name: spec.shape
        for name, spec in parameter_specs(config.model).items()
        if "blocks" in name and len(spec.shape) == 2
    }


# By default one goes over all, and others take turns with the halves; in full each goes over all.
HALVES = {"set": STOPS[:2], "rigl": STOPS, "srigl": STOPS[:2], "gradual": STOPS[2:], "st3": STOPS[:2], "pdp": STOPS[:2],
          "pdp_rows": STOPS[2:], "pdp_nm": STOPS[2:], "nm": STOPS[2:]}  # fmt: skip


# The others go by the same road, in `make test-slow` those whose masks are of other kinds.
NOW, SLOW = ("rigl",), ("gradual", "pdp_rows", "nm")
LATER = {m: [] if m in NOW else [pytest.mark.slow, *([] if m in SLOW else [pytest.mark.long])] for m in METHODS}


@pytest.mark.parametrize("method", [pytest.param(method, marks=marks) for method, marks in LATER.items()])
def test_a_run_moves_between_layouts(ranks, folder, method, full):
    base = config_of(method, folder)
    uninterrupted = named(on(base, 1), folder, f"{method}-whole")
    ranks.run(run_train, 1, uninterrupted)
    moved = named(base, folder, f"{method}-moved")
    for world, degrees, stop_at in STOPS if full else HALVES[method]:
        states = ranks.run(run_until, world, on(moved, world, **degrees), stop_at)
        assert states[0].step == stop_at
    ranks.run(run_train, 3, on(moved, 3, zero=0, shard=1, replicate=3) if method == "nm" else
              on(moved, 3, zero=3))  # fmt: skip
    assert_same_run(moved.run_dir, uninterrupted.run_dir)
    ours, theirs = final_tensors(moved.run_dir), final_tensors(uninterrupted.run_dir)
    masks = [name for name in theirs if name.endswith((".mask", ".first", ".last", ".fired"))]
    assert len(masks) >= 3 * len(hidden(base))
    assert all(torch.equal(ours[name], theirs[name]) for name in masks)
    sparse = [{k: v for k, v in record.items() if k in KEYS} for record in read_metrics(uninterrupted.run_dir)]
    assert sparse == [{k: v for k, v in record.items() if k in KEYS} for record in read_metrics(moved.run_dir)]


KEYS = (
    "density", "density_by_layer", "dead_neurons", "mask_overlap_first", "mask_replaced", "flops_per_token_forward",
    "flops_per_token_backward", "flops_of_dense",
)  # fmt: skip


OTHERS = [
    pytest.param("srigl", marks=pytest.mark.slow),
    *(pytest.param(method, marks=pytest.mark.full) for method in ("pdp", "pdp_rows", "pdp_nm")),
]


@pytest.mark.parametrize("method", ["rigl", *OTHERS])
def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder, method):
    config = on(config_of(method, folder, "steps=8", "eval.every=0"), 2, zero=2)
    assert_resumes_to_the_last_bit(ranks, 2, config, folder / f"{method}-bits", stop_at=5)


def test_metrics_tell_what_masks_are(ranks, folder):
    config = named(on(config_of("rigl", folder, "sparsity.redistribute=false"), 3, zero=3), folder, "counted")
    ranks.run(run_train, 3, config)
    tensors, shapes = final_tensors(config.run_dir), hidden(config)
    records = [record for record in read_metrics(config.run_dir) if "mask_replaced" in record]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    last, sizes = records[-1], {name: shape.numel() for name, shape in shapes.items()}
    bits = {name: tensors[f"sparsity.{name}.mask"] for name in shapes}
    active = {name: count(bits[name], shape[1]) for name, shape in shapes.items()}
    assert (
        last["density"]
        == sum(active.values()) / sum(sizes.values())
        == round(0.2 * sum(sizes.values())) / sum(sizes.values())
    )
    assert last["density_by_layer"] == {name: active[name] / sizes[name] for name in shapes}
    masks = {name: unpack(bits[name], shape[1]) for name, shape in shapes.items()}
    assert last["dead_neurons"] == sum(int((~mask.any(1)).sum()) for mask in masks.values()) > 0
    first = {name: unpack(tensors[f"sparsity.{name}.first"], shape[1]) for name, shape in shapes.items()}
    overlap = sum(int((masks[name] & first[name]).sum()) for name in shapes)
    assert last["mask_overlap_first"] == overlap / sum(active.values()) < 1
    assert 0.2 < records[0]["mask_replaced"] < 0.35 and records[-1]["mask_replaced"] < records[0]["mask_replaced"]
    dense, left = flops_per_token(config.model, config.batch.seq_len), sum(active.values())
    assert last["flops_per_token_forward"] == pytest.approx(dense / 3 - 2 * (sum(sizes.values()) - left))
    assert last["flops_of_dense"] * dense == pytest.approx(
        last["flops_per_token_forward"] + last["flops_per_token_backward"]
    )
    # And the weights are what the masks say.
    for name, mask in masks.items():
        assert not tensors[f"model.{name}"][~mask].any() and tensors[f"model.{name}"][mask].all()
        assert (
            not tensors[f"optim.{name}.exp_avg"][~mask].any() and not tensors[f"optim.{name}.exp_avg_sq"][~mask].any()
        )


def test_a_run_in_16_bits_stays_sparse(ranks, folder):
    """fp16 with a loss scale so high that steps overflow, one of them where masks are to change."""
    more = [
        "precision=fp16",
        "precision.initial_scale=1e14",
        "precision.growth_every=1000",
        "steps=24",
        "eval.every=0",
    ]
    config = named(on(config_of("gradual", folder, *more, "sparsity.update_every=1"), 2), folder, "fp16")
    ranks.run(run_train, 2, config)
    records = read_metrics(config.run_dir)
    assert records[17]["skipped_steps"] > 8 and records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["density"] == pytest.approx(0.2, abs=1e-4)
    tensors = final_tensors(config.run_dir)
    assert sum(int((tensors[f"model.{name}"] != 0).sum()) for name in hidden(config)) <= 0.2 * 1.001 * sum(
        shape.numel() for shape in hidden(config).values()
    )


def test_a_checkpoint_with_other_masks_is_refused(ranks, folder):
    config = named(on(config_of("rigl", folder), 1), folder, "refused")
    ranks.run(run_until, 1, config, 2)
    cases = {
        ("sparsity=set", "sparsity.update_every=2"): r"sparsity.name=rigl there and set here",
        (
            *METHODS["rigl"],
            "sparsity.density=0.3",
        ): r"holds other optimizer states: sparsity.density=0.2 there and 0.3 here",
        (*METHODS["rigl"], "sparsity.distribution=uniform"): r"sparsity.distribution=erk there and uniform here",
        (*METHODS["rigl"], "sparsity.stop_at=12"): r"sparsity.stop_at=9 there and 12 here",
        (*METHODS["rigl"], "sparsity.update_every=0.25"): r"sparsity.update_every=2 there and 3 here; give the same",
        (*METHODS["rigl"], "steps=40"): r"sparsity.stop_at=9 there and 30 here; give the same",
    }
    for overrides, message in cases.items():
        with pytest.raises(ValueError, match=message):
            prepare(named(small_config(folder, *SHAPE, *overrides), folder, "refused"), 1)
    dense = named(small_config(folder, *SHAPE), folder, "refused")
    with pytest.raises(ValueError, match=r"sparsity.name=rigl there and none here"):
        prepare(dense, 1)
    longer = replace(config, steps=40, sparsity=replace(config.sparsity, stop_at=9))
    assert prepare(longer, 1).steps == 40
    by_share = replace(longer, sparsity=replace(longer.sparsity, update_every=0.05))
    assert prepare(by_share, 1).steps == 40, "which are 2 steps too"
    assert state_facts(by_share) != state_facts(replace(by_share, steps=80)), "longer, they are 4"
