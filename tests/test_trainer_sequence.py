"""Whole runs over shared sequences: moved between layouts, evaluated, sampled, compiled, in 16 bits, with other savings."""

from dataclasses import replace

import pytest
import torch

from parity import small_config, with_layout
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer.sample import generate
from rowwise.trainer.train import build_model
from runs import assert_same_run, final_tensors, named, records, run_train, run_until

OVERRIDES = (
    "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "batch.seq_len=29", "batch.global_size=8", "steps=12",
    "eval.every=4", "eval.batches=2",
)  # fmt: skip
BOTH = {"ulysses": 2, "ring": 2, "ring_order": "zigzag"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sequence-runs")


@pytest.fixture(scope="module")
def uninterrupted(ranks, folder):
    """Never stopped, on one process."""
    config = named(with_layout(small_config(folder, *OVERRIDES), 1), folder, "uninterrupted")
    ranks.run(run_train, 1, config)
    return config


def test_a_run_moves_between_degrees_and_back(ranks, folder, uninterrupted):
    base = named(small_config(folder, *OVERRIDES), folder, "moved")
    stops = [
        (4, BOTH | {"zero": 3}, 2),
        (1, {}, 4),
        (2, {"ring": 2, "ring_order": "striped"}, 6),
        (4, {"ulysses": 4, "zero": 0}, 8),
        (4, {"ring": 2, "ring_order": "contiguous", "pipeline": 2, "zero": 2}, 10),
    ]
    for world, degrees, stop_at in stops:
        ranks.run(run_until, world, with_layout(base, world, **degrees), stop_at)
    ranks.run(run_train, 3, with_layout(base, 3, ring=3, zero=3))
    assert_same_run(base.run_dir, uninterrupted.run_dir)


def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder):
    config = with_layout(small_config(folder, *OVERRIDES), 4, **BOTH, zero=3)
    whole, stopped = named(config, folder, "whole"), named(config, folder, "stopped")
    ranks.run(run_train, 4, whole)
    ranks.run(run_until, 4, stopped, 6)
    ranks.run(run_train, 4, stopped)
    assert records(whole.run_dir) == records(stopped.run_dir)
    theirs = final_tensors(whole.run_dir)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in final_tensors(stopped.run_dir).items())


def sample(workers, config):
    mesh = make_mesh(config.parallel, workers)
    return generate(build_model(config, mesh), [1, 2, 3], 12, 0.0, 11, 0, mesh)


def test_shared_sequences_write_what_one_process_writes(ranks, folder):
    config = small_config(folder, *OVERRIDES)
    (alone,) = ranks.run(sample, 1, with_layout(config, 1))
    for world, degrees in ((4, BOTH), (3, {"ring": 3, "ring_order": "striped"}), (4, {"pipeline": 2, "ulysses": 2})):
        assert ranks.run(sample, world, with_layout(config, world, **degrees, zero=3)) == [alone] * world


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        (("optim.in_backward=true", "clip_norm=0", "batch.global_size=2"), BOTH | {"zero": 3}),
        (
            ("parallel.post_validation=true", "batch.micro_size=1", "clip_norm=0.3"),
            {"pipeline": 2, "pipeline_schedule": "zb_h2", "ring": 2, "zero": 2},
        ),
        (
            ("parallel.pipeline_schedule=auto", "batch.micro_size=1"),
            {"pipeline": 2, "virtual_stages": 1, "ulysses": 2, "zero": 1},
        ),
    ],
    ids=["in_backward", "post_validation", "auto"],
)
def test_with_other_savings(ranks, folder, request, options, layout):
    config = small_config(folder, *OVERRIDES, *options)
    alone = replace(config.parallel, post_validation=False, pipeline_schedule="1f1b")
    runs = {}
    for name, world, parallel, degrees in (("alone", 1, alone, {}), ("shared", 4, config.parallel, layout)):
        checked = with_layout(replace(config, parallel=parallel), world, **degrees)
        runs[name] = named(checked, folder, f"{request.node.callspec.id}-{name}")
        ranks.run(run_train, world, runs[name])
    assert_same_run(runs["shared"].run_dir, runs["alone"].run_dir)
