"""Laws 2, 3 and 4 for what is frozen in fewer bits: every layout is one process that multiplies by the numbers behind the bytes."""

from pathlib import Path

import pytest
import torch

from parity import assert_all_same, in_micro_batches, run_plain, run_together, small_config, with_layout
from rowwise.kernels.coded_rows import NF4, decode_rows
from rowwise.kernels.rows import local
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer.assemble import assemble
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.plan.states import parameter_bytes, place_of
from rowwise.trainer.whole import Source, load_model, read_tensors
from runs import assert_resumes_to_the_last_bit, assert_same_run, named, run_train, run_until

DORA = ("adapter=dora", "adapter.rank=3", "adapter.alpha=7", "adapter.dropout=0.2", "optim.weight_decay=0.1")
LORA = ("adapter=lora", "adapter.rank=3", "adapter.alpha=7", "optim.weight_decay=0.1")
FROZEN = ("optim.assign=[{match: 'embed.*', rule: frozen}, {match: 'blocks.0.*', rule: frozen}]",)
SPLIT = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}
BOTH = {"ulysses": 2, "ring": 2, "ring_order": "zigzag"}
SHARED = ("model.heads=4", "model.kv_heads=2", "model.head_dim=6")
FOUR = ("model.layers=4", "batch.micro_size=1", "batch.global_size=8")
AWAY = ("memory.offload_params=cpu", "memory.offload_states=cpu", "memory.recompute=selective")
# Options -> the layouts on which they are tried.
CASES = {
    "nf4": ((*LORA, *SHARED, "model.frozen_dtype=nf4"), [(1, {}), (2, {"zero": 0}), (4, {**BOTH, "zero": 3})]),
    "int8 split": ((*DORA, *FOUR, "model.frozen_dtype=int8"), [(4, {**SPLIT, "zero": 3})]),
    "dora": ((*DORA, *SHARED, "model.frozen_dtype=nf4", "memory.recompute=full"), [(1, {}), (4, {**BOTH, "zero": 3})]),
    "bf16": ((*FROZEN, "model.frozen_dtype=bf16"), [(2, {"zero": 0}), (4, {"replicate": 2, "zero": 3})]),
    "bone": (("adapter=bone", "adapter.rank=5", *FOUR, "model.frozen_dtype=nf4"), [(1, {}), (4, {**SPLIT, "zero": 3})]),
    "nf4 away": ((*LORA, "model.frozen_dtype=nf4", *AWAY), [(2, {"zero": 3})]),
}


def on(config, world: int, **layout):
    """On a layout, with two micro-batches a rank and step, or the four that a pipeline of two stages a rank takes."""
    return in_micro_batches(with_layout(config, world, **layout), 4 if "pipeline" in layout else 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frozen")


# For which the others stand, unless --full.
NAMES = [pytest.param(name, marks=[pytest.mark.full] if name in ("bf16", "nf4 away", "dora") else []) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_one_process(ranks, folder, name):
    """Every gradient and every update; what is frozen stays, to the last bit, what it was."""
    options, layouts = CASES[name]
    config = small_config(folder, *options)
    reference = run_plain(config)
    plain = run_plain(small_config(folder, *options, "model.frozen_dtype=null"), steps=1)
    assert reference.losses[0] != plain.losses[0]
    configs = {number: on(config, world, **layout) for number, (world, layout) in enumerate(layouts)}
    for traces in run_together(ranks, configs).values():
        assert_all_same(traces, reference)


def held_bytes(workers, config):
    """What a rank has of parameters, and what is forecast of it."""
    mesh = make_mesh(config.parallel, workers)
    built = assemble(config, mesh)
    held = sum(local(q).nbytes for q in built.model.parameters())
    built.close()
    place = place_of(mesh.rank, config.parallel)
    return held, parameter_bytes(config, range(config.model.layers), place, place.shards > 1)


def test_bytes_are_those_that_are_forecast(ranks, folder):
    """Law 4 of parameters, to the byte, on one rank and on two; nf4 is an eighth of float32 and its scales."""
    heads = ("model.heads=4", "model.kv_heads=2", "model.dim=256", "model.ffn_dim=512", "model.vocab_size=64")
    wide = (*heads, "precision=fp32", "optim=adamw", "adapter.rank=4")  # FSDP2 makes rows up to as many on each rank
    found = {}
    for choice in ("null", "bf16", "int8", "nf4"):
        config = small_config(folder, *LORA, *wide, f"model.frozen_dtype={choice}")
        for world in (1, 2):
            for held, forecast in ranks.run(held_bytes, world, with_layout(config, world, zero=3)):
                assert held == forecast
                found[choice, world] = held
    base, sizes = found["null", 1], {"bf16": 2, "int8": 1 + 4 / 256, "nf4": 0.5 + 1 / 64 + 8 / 256}
    hidden = [(base - found[choice, 1]) / (4 - size) for choice, size in sizes.items()]  # how many numbers are kept so
    assert min(hidden) == pytest.approx(max(hidden), rel=0.003) and 4 * min(hidden) > 0.9 * base


def test_codes_of_four_ranks_go_on_on_one_and_are_read_as_numbers(ranks, folder):
    config = small_config(folder, *LORA, *SHARED, "model.frozen_dtype=nf4", "steps=4", "eval.every=2", "eval.batches=1")
    base, alone = named(config, folder, "moved"), named(with_layout(config, 1), folder, "alone")
    ranks.run(run_train, 1, alone)
    ranks.run(run_until, 4, with_layout(base, 4, **BOTH, zero=3), 2)
    ranks.run(run_train, 1, with_layout(base, 1))
    assert_same_run(base.run_dir, alone.run_dir)

    checkpoint = complete_checkpoints(Path(alone.run_dir) / "checkpoints")[0]
    model = load_model(Source(checkpoint, read_manifest(checkpoint)), torch.device("cpu"))
    layer = "blocks.1.feed_forward.w1"
    weight = model.get_parameter(f"{layer}.weight").double()
    rows, columns = weight.shape
    packed = torch.empty(rows, NF4.row_bytes(columns), dtype=torch.uint8)
    a, b = torch.empty(3, columns, dtype=torch.float64), torch.empty(rows, 3, dtype=torch.float64)
    read_tensors(
        checkpoint, {f"model.{layer}.{key}": t for key, t in (("weight", packed), ("lora_a", a), ("lora_b", b))}
    )
    assert b.any()
    right = decode_rows(packed, columns, NF4, torch.float64) + 7 / 3 * b @ a
    torch.testing.assert_close(weight, right, rtol=1e-12, atol=1e-14)


@pytest.mark.full  # test_trainer_writer has a run that is resumed, and codes go on on other ranks above
def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder):
    config = small_config(folder, *LORA, *FOUR, "model.frozen_dtype=int8", "steps=4")
    assert_resumes_to_the_last_bit(ranks, 2, on(config, 2, zero=3), folder, stop_at=2)
