"""The loss without logits wherever there is a head: law 2, in tiles far smaller than the model, what is gathered, and old runs."""

import functools
from dataclasses import replace
from unittest import mock

import pytest
import torch

from messages import Messages
from parity import (
    Trace,
    assert_all_same,
    engine_on,
    in_micro_batches,
    run_layouts,
    run_plain,
    small_config,
    with_layout,
)
from rowwise.kernels.cross_entropy import TILES, Tiles
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer.config import tree_of
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.resume import changes

SMALL = Tiles(elements=160, most=9, least=4)
TIED, UNTIED = "model.tie_embeddings=true", "model.tie_embeddings=false"
LAYOUTS = {  # workers, degrees, which heads by default: every kind of backward meets both
    "zero 3": (2, {"zero": 3}, [TIED, UNTIED]),
    "whole backwards": (4, {"zero": 3, "pipeline": 2, "pipeline_schedule": "1f1b"}, [UNTIED]),
    "split backwards": (4, {"zero": 3, "pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}, [TIED]),
    "shared sequences": (4, {"zero": 3, "ulysses": 2, "ring": 2}, [UNTIED]),
}
STEPS = 2  # the second sees that the update of the first arrived; a third would see no more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fused-loss")


@functools.cache
def config_of(folder, *overrides: str):
    """Documents, several micro-batches, unequal valid tokens, heads and layers that every layout here divides."""
    return small_config(
        folder, "model.layers=4", "model.dim=12", "model.heads=2", "model.kv_heads=2", "model.ffn_dim=9", "batch.global_size=8",
        "batch.micro_size=1", *overrides,
    )  # fmt: skip


@functools.cache
def reference(folder, tied: str) -> Trace:
    """By way of logits, in one process."""
    return run_plain(config_of(folder, tied), STEPS)


def in_small_tiles(workers, configs) -> list[Trace]:
    with mock.patch.dict(TILES, {"cpu": SMALL}):
        return run_layouts(workers, configs, STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_those_of_one_process_with_logits(ranks, folder, layout, full):
    world, degrees, heads = LAYOUTS[layout]
    every = {
        tied: in_micro_batches(
            with_layout(config_of(folder, tied), world, **degrees), 4 if "pipeline" in degrees else 2
        )
        for tied in ([TIED, UNTIED] if full else heads)
    }
    assert all(config.memory.fused_loss for config in every.values())
    traces = zip(*ranks.run(in_small_tiles, world, list(every.values())), strict=True)
    for tied, of_ranks in zip(every, traces, strict=True):
        assert_all_same(list(of_ranks), reference(folder, tied))


@pytest.mark.parametrize("layout", ["zero 3", "split backwards"])
def test_so_do_those_with_logits_on_every_rank(ranks, folder, layout):
    world, degrees, _ = LAYOUTS[layout]
    config = with_layout(config_of(folder, UNTIED, "memory.fused_loss=false"), world, **degrees)
    (traces,) = zip(*ranks.run(run_layouts, world, [config], STEPS), strict=True)
    assert_all_same(list(traces), reference(folder, UNTIED))


def count_gathers(workers, configs) -> list[int]:
    """All-gathers of a step in small tiles, for each configuration."""
    mesh, counted = make_mesh(configs[0].parallel, workers), []
    for config in configs:
        engine = engine_on(mesh, config)
        data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
        batches = train_batches(config, mesh, data, 0)
        engine.forward_backward(next(batches), 1.0)
        with Messages() as messages, mock.patch.dict(TILES, {"cpu": SMALL}):
            engine.forward_backward(next(batches), 1.0)
        counted.append(messages.calls["_allgather_base_"])
    return counted


@pytest.mark.parametrize("layout", ["zero 3", "split backwards"])
def test_a_head_is_gathered_once_a_micro_batch_and_not_once_a_tile(ranks, folder, layout):
    world, degrees, _ = LAYOUTS[layout]
    configs = [
        with_layout(config_of(folder, UNTIED, f"memory.fused_loss={fused}"), world, **degrees)
        for fused in ("true", "false")
    ]
    for fused, plain in ranks.run(count_gathers, world, configs):
        assert fused == plain > 0


def without_labels(batch: MicroBatch) -> MicroBatch:
    return replace(batch, labels=torch.full_like(batch.labels, -100))


def evaluate(workers, configs) -> list[list[torch.Tensor]]:
    """For each configuration, what a rank saw of three micro-batches of which one has no label: evaluated, and trained on."""
    mesh, found = make_mesh(configs[0].parallel, workers), []
    for config in configs:
        engine = engine_on(mesh, config)
        data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
        one, two, *_ = next(train_batches(config, mesh, data, 0))
        with mock.patch.dict(TILES, {"cpu": SMALL}):
            seen = [
                engine.losses([one, without_labels(two), two]),
                engine.forward_backward([one, without_labels(two), two], 1.0),
            ]
            nothing = engine.losses([without_labels(one)])
            engine.model.zero_grad()
            nothing += engine.forward_backward([without_labels(one)], 1.0)
        found.append(
            [*seen, nothing, torch.stack([p.grad.to_local().abs().sum() for p in engine.model.parameters()]).sum()]
        )
    return found


def test_evaluation_and_micro_batches_without_a_label(ranks, folder):
    every = [
        with_layout(config_of(folder, UNTIED, f"memory.fused_loss={fused}"), 2, zero=3) for fused in ("true", "false")
    ]
    for fused, plain in ranks.run(evaluate, 2, every):
        torch.testing.assert_close(fused[:2], plain[:2], rtol=1e-12, atol=0)
        torch.testing.assert_close(fused[0], fused[1], rtol=1e-12, atol=0)
        assert fused[0].gt(0).all() and fused[2].eq(0).all() and fused[3] == 0


def test_a_run_that_knew_no_choice_goes_on_without_logits_and_says_so(folder):
    config = config_of(folder, UNTIED)
    before = {key: value for key, value in tree_of(config).items() if key != "memory"}
    told, _ = changes({"config": before, "step": 1}, config)
    assert told == "changed since: memory.fused_loss False -> True"
    assert changes({"config": tree_of(config), "step": 1}, config) == []
