"""Whole runs over shared sequences: moved between layouts, evaluated, sampled, compiled, in 16 bits, with other savings. (Law 3.)"""

import functools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from parity import engine_on, in_micro_batches, plain_engine, small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.shard import gradients, squared_norm
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.sample import generate
from runs import assert_resumes_to_the_last_bit, assert_same_run, named, run_train, run_until

OVERRIDES = (
    "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "batch.seq_len=29", "batch.global_size=8", "batch.micro_size=2",
    "steps=6", "eval.every=2", "eval.batches=1",
)  # fmt: skip


def on(config, world: int, **degrees):
    """On a layout, with a micro-batch a stage."""
    return in_micro_batches(with_layout(config, world, **degrees), degrees.get("pipeline", 1))


BOTH = {"ulysses": 2, "ring": 2, "ring_order": "zigzag"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sequence-runs")


@pytest.fixture(scope="module")
def uninterrupted(ranks, folder):
    """Never stopped, on one process."""
    config = named(on(small_config(folder, *OVERRIDES), 1), folder, "uninterrupted")
    ranks.run(run_train, 1, config)
    return config


def test_a_run_moves_between_degrees_and_back(ranks, folder, uninterrupted):
    base = named(small_config(folder, *OVERRIDES), folder, "moved")
    stops = [
        (4, BOTH | {"zero": 3}, 1),
        (1, {}, 2),
        (2, {"ring": 2, "ring_order": "striped"}, 3),
        (4, {"ulysses": 4, "zero": 0}, 4),
        (4, {"ring": 2, "ring_order": "contiguous", "pipeline": 2, "zero": 2}, 5),
    ]
    for world, degrees, stop_at in stops:
        states = ranks.run(run_until, world, on(base, world, **degrees), stop_at)
        assert states[0].step == stop_at
    ranks.run(run_train, 3, on(base, 3, ring=3, zero=3))
    assert_same_run(base.run_dir, uninterrupted.run_dir)


def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder):
    config = on(small_config(folder, *OVERRIDES, "steps=4"), 2, ring=2, zero=3)
    assert_resumes_to_the_last_bit(ranks, 2, config, folder, stop_at=2)


def sample(workers, config):
    mesh = make_mesh(config.parallel, workers)
    return generate(engine_on(mesh, config), [1, 2, 3], 12, 0.0, 11, 0, mesh)


def sample_plainly(workers, config):
    mesh = make_mesh(config.parallel, workers)
    return generate(plain_engine(mesh, config), [1, 2, 3], 12, 0.0, 11, 0, mesh)


def test_shared_sequences_write_what_one_process_writes(ranks, folder):
    config = small_config(folder, *OVERRIDES)
    (alone,) = ranks.run(sample_plainly, 1, with_layout(config, 1))
    for world, degrees in ((4, BOTH), (3, {"ring": 3, "ring_order": "striped"}), (4, {"pipeline": 2, "ulysses": 2})):
        assert ranks.run(sample, world, with_layout(config, world, **degrees, zero=3)) == [alone] * world


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        (("optim.in_backward=true", "clip_norm=0", "batch.micro_size=8"), BOTH | {"zero": 3}),
        (
            ("parallel.post_validation=true", "batch.micro_size=2", "clip_norm=0.3"),
            {"pipeline": 2, "pipeline_schedule": "zb_h2", "ring": 2, "zero": 2},
        ),
        (
            ("parallel.pipeline_schedule=auto", "batch.micro_size=2"),
            {"pipeline": 2, "virtual_stages": 1, "ulysses": 2, "zero": 1},
        ),
    ],
    ids=["in_backward", "post_validation", "auto"],
)
def test_with_other_savings(ranks, folder, request, options, layout):
    config = small_config(folder, *OVERRIDES, "steps=3", "eval.every=3", *options)
    alone = replace(config.parallel, post_validation=False, pipeline_schedule="1f1b")
    runs = {}
    for name, world, parallel, degrees in (("alone", 1, alone, {}), ("shared", 4, config.parallel, layout)):
        checked = with_layout(replace(config, parallel=parallel), world, **degrees)
        checked = in_micro_batches(checked, 1) if world == 1 else checked
        runs[name] = named(checked, folder, f"{request.node.callspec.id}-{name}")
        ranks.run(run_train, world, runs[name])
    assert_same_run(runs["shared"].run_dir, runs["alone"].run_dir)


def test_16_bits_stay_near_one_process(ranks, folder, uninterrupted):
    """The same tokens in bf16: losses differ by roundings, and no more for shared sequences than for one process."""
    config = small_config(folder, *OVERRIDES, "precision=bf16", "steps=4", "eval.every=0")
    runs = {"exact": uninterrupted}
    for name, world, layout in (("alone", 1, {}), ("shared", 4, BOTH | {"zero": 3})):
        runs[name] = named(on(config, world, **layout), folder, f"bits_{name}")
        ranks.run(run_train, world, runs[name])
    losses = {name: torch.tensor([r["loss"] for r in read_metrics(Path(c.run_dir))[:4]]) for name, c in runs.items()}
    alone, shared = ((losses[name] - losses["exact"]).abs().max().item() for name in ("alone", "shared"))
    assert 0 < shared <= max(2 * alone, 0.01)


@pytest.mark.parametrize("tokens", [2_048, pytest.param(16_384, marks=[pytest.mark.slow, pytest.mark.long])])
def test_a_long_context_on_four_ranks(ranks, tmp_path, tokens):
    """The named run, of 16,384 tokens, in float64 and smaller in everything else: the loss is one process's."""
    text = tmp_path / "text.txt"
    chance = random.Random(11)
    text.write_text(" ".join(chance.choice(("shared", "sequence", "of", "many", "tokens")) for _ in range(45_000)))
    smaller = ("steps=1", "model.layers=1", "model.dim=32", "model.ffn_dim=32", "eval.every=1", "eval.batches=1")
    data = ("data=text", f"data.files={text}", "data.holdout=0.2", "data.mask_documents=false")
    tree = compose_tree(["experiment=long_context", "precision=fp64", *smaller, *data, f"run_dir={tmp_path}/run"])
    config = config_from_tree(tree)
    assert config.batch.seq_len == 16_384
    config = replace(config, batch=replace(config.batch, seq_len=tokens))
    shared = check(config, 4)
    alone = check(replace(config, parallel=replace(config.parallel, ulysses=1, ring=1), run_dir=f"{tmp_path}/alone"), 1)
    ranks.run(run_train, 4, shared)
    ranks.run(run_train, 1, alone)
    assert_same_run(shared.run_dir, alone.run_dir)


def compiled_gradients(workers, config, backend: str) -> tuple[float, int]:
    """The squared norm of the gradients of three steps whose documents differ, and how often blocks were compiled."""
    whole, torch.compile = torch.compile, functools.partial(torch.compile, backend=backend)
    try:
        return gradients_and_graphs(workers, config)
    finally:
        torch.compile = whole


def gradients_and_graphs(workers, config) -> tuple[float, int]:
    mesh = make_mesh(config.parallel, workers)
    engine = engine_on(mesh, config)
    batches = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    counters.clear()
    for _ in range(3):
        engine.forward_backward(next(batches), 0.01)
    squared = float(squared_norm(gradients(engine.model)))
    return squared, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])])
def test_compiled_blocks_are_not_compiled_anew_for_other_documents(ranks, folder, backend, full):
    """How often is Dynamo's to say, whatever then makes programs of its graphs. One rank alone is in full, and in `make test-long`."""
    one = ("batch.global_size=2", "batch.micro_size=2", "parallel.zero=0", "model.layers=1")
    config = small_config(folder, *OVERRIDES, *one)
    for world, degrees in ((1, {}), (2, {"ring": 2}))[0 if full or backend == "inductor" else 1 :]:
        plain, compiled = (
            ranks.run(compiled_gradients, world, with_layout(replace(config, compile=on), world, **degrees), backend)
            for on in (False, True)
        )
        for (expected, none), (found, graphs) in zip(plain, compiled, strict=True):
            assert found == pytest.approx(expected, rel=1e-9)
            assert none == 0 < graphs <= 4  # before attention and after it; not for every batch
