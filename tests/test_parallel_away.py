"""Rows that wait off the device: the same run, to the last bit, as with rows that do not. (Law 2.)"""

from dataclasses import replace

import pytest
import torch

from parity import run_layouts, small_config, with_layout

TENSORS = ("gradients", "updates", "states", "masks")
WIDE = ("model.dim=64", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=76")
SPARSE = ("sparsity.update_every=1", "sparsity.stop_at=2")
TWO, HOST = ("parallel.pipeline=2",), ("memory.offload_params=cpu", "memory.offload_states=cpu")
# What meets what: each option is under rows in files, and gradients in files where they wait, on a layout that has them in its own
# way; layouts, rules and forms of numbers in turn. name -> (workers, options).
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ("optim=adamw8bit", *WIDE)),
    "in the backward": (2, ("optim.in_backward=true", "batch.micro_size=12", "clip_norm=0")),
    "in the backward, one rank": (1, ("optim.in_backward=true", "batch.micro_size=24", "clip_norm=0", "optim=lion")),
    "more ranks than rows": (4, ("optim=adafactor", "model.dim=2", "model.heads=1", "model.kv_heads=1", "model.ffn_dim=3")),
    "replicas": (4, ("parallel.replicate=2", "optim=muon")),
    "replicas of whole rows": (2, ("parallel.replicate=2",)),
    "1f1b": (4, (*TWO, "model.tie_embeddings=true", "optim=fira", "optim.rank=8", "optim.refresh_every=2", *WIDE)),
    "whole rows in stages": (2, (*TWO, *HOST, "parallel.pipeline_schedule=zb_h1", "parallel.pipeline_gather=run")),
    "undone": (2, (*TWO, "parallel.pipeline_schedule=zb_h1", "parallel.post_validation=true", "clip_norm=1e-3")),
    "chunks": (2, (*TWO, "parallel.pipeline_schedule=zb_v", "parallel.virtual_stages=2", "model.layers=4", "batch.micro_size=6")),
    "ulysses": (2, ("parallel.ulysses=2", "model.heads=2", "model.kv_heads=2", "model.dim=32", "model.tie_embeddings=true")),
    "ring": (2, ("parallel.ring=2", "parallel.ring_order=zigzag", "memory.recompute=full")),
    "rigl": (2, ("sparsity=rigl", *SPARSE, "memory.recompute=selective")),
    "2:4": (2, ("sparsity=nm", "sparsity.decay=0.3", *WIDE)),
    "16 bits": (2, ("precision=bf16", "optim=adamw8bit", *WIDE)),
    "parameters of 16 bits": (2, ("precision=bf16", "optim.param_dtype=bf16", "batch.micro_size=12", "memory.compress=int8", *WIDE)),
    "16 bits, one rank": (1, ("precision=bf16", "optim=lion8bit", "memory.offload_activations=cpu", *WIDE)),
    "fp16": (2, ("precision=fp16", "optim=lion")),
}  # fmt: skip


def config_of(folder, *overrides):
    return small_config(folder, "optim=adamw", "parallel.zero=3", "parallel.timeout_seconds=60", *overrides)


def away(config, params, gradients="none"):
    gradients = "none" if config.optim.in_backward else gradients
    memory = replace(config.memory, offload_states="cpu", offload_params=str(params), offload_gradients=str(gradients))
    return replace(config, memory=memory)


def assert_equal(first, other):
    assert (first.losses, first.norms) == (other.losses, other.norms)
    for kind in TENSORS:
        for mine, theirs in zip(getattr(first, kind), getattr(other, kind), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(t, theirs[name]) for name, t in mine.items()), kind


@pytest.mark.parametrize("case", CASES)
def test_rows_in_files_change_no_bit(ranks, tmp_path, case):
    world, overrides = CASES[case]
    given = with_layout(config_of(tmp_path, *overrides), world)
    plain = replace(given, memory=replace(given.memory, offload_states="none", offload_params="none"))
    first, other = ranks.run(run_layouts, world, [plain, away(plain, tmp_path, tmp_path)], 2)[0]
    assert first.losses[0] != first.losses[1]
    assert_equal(first, other)
