"""Weights that are gathered in 8 bits, and from copies among neighbours: the steps of one process, runs that go on, and bytes.
(Laws 2, 3 and 4.)"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from messages import Crossed, crossings
from parity import Trace, assert_all_same, run_plain, run_together, small_config, step_input, with_layout
from rowwise.kernels.row_codes import rounded_rows
from rowwise.parallel import gather
from rowwise.parallel.mesh import Mesh, Workers, make_mesh
from rowwise.parallel.precision import compute_dtype
from rowwise.parallel.row_messages import RowMessages
from rowwise.parallel.shard import sharded_parts
from rowwise.parallel.torch_fsdp import padded_shapes
from rowwise.trainer.assemble import assemble as assemble_run
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.update import make_update
from runs import assert_same_run, final_tensors, named, records, run_train, run_until

STEPS = 2
IN_BACKWARD = "optim.in_backward=true"
INT8 = "parallel.quantize_gather=int8"
WIDE = ("model.dim=288", "model.heads=3", "model.kv_heads=1", "model.head_dim=4", "model.ffn_dim=7", "model.layers=1")
HEADS = ("model.heads=4", "model.kv_heads=2", "model.head_dim=8")
# name -> workers, degrees, overrides, those of one process too
CASES = {
    "one process": (1, {"zero": 1}, (), (INT8,)),
    "one process, gathered twice": (1, {"zero": 3}, (), (INT8,)),
    "replicas": (2, {"zero": 0}, (), (INT8,)),
    "zero 1": (2, {"zero": 1}, (), (INT8, "model.tie_embeddings=true")),
    "zero 2": (4, {"zero": 2, "replicate": 2}, (), (INT8, "optim=adamw8bit")),
    "zero 3": (3, {"zero": 3}, ("memory.recompute=selective",), (INT8, "model.qk_norm=true", "clip_norm=0")),
    "two blocks of a row": (2, {"zero": 3}, (), (INT8, *WIDE)),
    "pipeline": (2, {"zero": 1, "pipeline": 2}, ("parallel.pipeline_schedule=zb_h1",), (INT8, "model.tie_embeddings=true")),
    "ulysses": (2, {"zero": 3, "ulysses": 2}, (), (INT8, *HEADS)),
    "in backward": (2, {"zero": 2}, (IN_BACKWARD, "batch.micro_size=12"), (INT8, "clip_norm=0")),
    "in backward, whole": (1, {"zero": 0}, (IN_BACKWARD, "batch.micro_size=24"), (INT8, "clip_norm=0")),
    "rigl": (2, {"zero": 3}, (), (INT8, "sparsity=rigl", "sparsity.update_every=1", "sparsity.stop_at=2")),
    "copies": (4, {"zero": 3}, ("parallel.inner_shard=2",), ()),
    "copies of all": (2, {"zero": 3}, ("parallel.inner_shard=1", "batch.micro_size=3"), ("model.tie_embeddings=true",)),
    "copies, replicas": (4, {"zero": 3, "replicate": 2}, ("parallel.inner_shard=1", "memory.recompute=full"), ("optim=lion",)),
    "copies, ulysses": (4, {"zero": 3, "ulysses": 2}, ("parallel.inner_shard=2",), HEADS),
    "copies, pipeline": (
        4,
        {"zero": 3, "pipeline": 2},
        ("parallel.inner_shard=1", "parallel.pipeline_gather=micro_batch"),
        ("model.tie_embeddings=true",),
    ),
    "copies, in backward": (
        2,
        {"zero": 3},
        ("parallel.inner_shard=1", IN_BACKWARD, "batch.micro_size=12"),
        ("clip_norm=0",),
    ),
    "copies, sparse": (2, {"zero": 3}, ("parallel.inner_shard=1",), ("sparsity=set", "sparsity.update_every=1", "sparsity.stop_at=2")),
    "copies of codes": (4, {"zero": 3}, ("parallel.inner_shard=2",), (INT8, "optim=adamw8bit")),
    "copies of codes, rows away": (
        2,
        {"zero": 3},
        ("parallel.inner_shard=1", "memory.offload_params=cpu", "memory.offload_states=cpu"),
        (INT8,),
    ),
    "copies of codes, pipeline": (
        4,
        {"zero": 3, "pipeline": 2},
        ("parallel.inner_shard=1", "parallel.pipeline_schedule=1f1b"),
        (INT8,),
    ),
}  # fmt: skip


# Those for which others stand: what they have is in another case together with more.
FULL = (
    "one process", "copies", "copies, replicas", "copies of codes, pipeline", "zero 2", "copies, in backward", "copies, sparse",
    "replicas", "in backward, whole", "copies of all", "zero 1", "copies of codes",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gather")


@functools.cache
def plain(folder: Path, *overrides: str) -> Trace:
    return run_plain(small_config(folder, *overrides), STEPS)


@pytest.fixture(scope="module")
def traces(ranks, folder, full) -> dict[str, list[Trace]]:
    configs = {
        name: with_layout(small_config(folder, *own, *both), world, **degrees)
        for name, (world, degrees, own, both) in CASES.items()
        if full or name not in FULL
    }
    return run_together(ranks, configs, STEPS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in CASES]
)
def test_steps_equal_those_of_one_process(traces, folder, name):
    _, _, own, both = CASES[name]
    reference = plain(folder, *both)
    if IN_BACKWARD in own:  # no gradient is left to compare; what it changed is
        assert not any(trace.gradients for trace in traces[name])
        reference = replace(reference, gradients=[])
    assert_all_same(traces[name], reference)


def test_rounded_weights_are_not_the_exact_ones(folder):
    assert plain(folder, INT8).losses[0] != plain(folder).losses[0]


def whole_run(folder: Path, *overrides: str, world: int = 4, **degrees: int) -> TrainConfig:
    """A run that is evaluated and saved between its steps."""
    saved = ("eval.every=1", "eval.batches=1", "checkpoint.every=2", "batch.micro_size=3")
    return with_layout(small_config(folder, *saved, *overrides), world, **degrees)


@pytest.fixture(scope="module")
def without_copies(ranks, folder) -> TrainConfig:
    config = named(whole_run(folder, INT8, zero=3), folder, "without")
    ranks.run(run_train, 4, config)
    return config


def test_copies_change_no_bit_of_a_run_that_stops_and_goes_on(ranks, folder, without_copies, full):
    """Evaluations, saves and the next step see the weights after each step, never a copy of those before, in a run that begins with
    neighbours that keep copies, stops, and goes on without; and in one that keeps them. (Laws 2 and 3.)"""
    with_copies = named(whole_run(folder, INT8, "parallel.inner_shard=2", zero=3), folder, "with")
    if full:
        ranks.run(run_train, 4, with_copies)
    moved = named(with_copies, folder, "moved")
    ranks.run(run_until, 4, moved, 2)
    ranks.run(run_train, 4, named(without_copies, folder, "moved"))
    for run in (moved, with_copies) if full else (moved,):
        assert records(run.run_dir) == records(without_copies.run_dir)
        assert evaluated(run) == evaluated(without_copies)
        ours, theirs = final_tensors(run.run_dir), final_tensors(without_copies.run_dir)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_goes_on_on_another_layout(ranks, folder, without_copies):
    """What is saved is exact, so one process that goes on computes with the same rounded weights. (Law 3.)"""
    moved = named(without_copies, folder, "on one process")
    ranks.run(run_until, 4, moved, 2)
    ranks.run(run_train, 1, named(whole_run(folder, INT8, world=1, zero=0), folder, "on one process"))
    assert_same_run(moved.run_dir, without_copies.run_dir)


def evaluated(config: TrainConfig) -> list[float]:
    return [record["eval_loss"] for record in read_metrics(Path(config.run_dir)) if "eval_loss" in record]


def test_what_is_saved_is_exact(folder, without_copies):
    """Rounded to 8 bits, a matrix would not change by being rounded again."""
    tensors = final_tensors(without_copies.run_dir)
    name = next(name for name in tensors if name.endswith("embed.weight") and "model" in name)
    assert not torch.allclose(rounded_rows(tensors[name]), tensors[name], rtol=1e-6, atol=0)


# Bytes of one step on 2 x 2 ranks, as one of them counts them. Rows are whole blocks, so that formulas are short.
SHAPE = (
    "model.dim=256", "model.heads=2", "model.kv_heads=2", "model.head_dim=8", "model.ffn_dim=256", "model.layers=2",
    "batch.global_size=8", "batch.micro_size=1", "steps=2",
)  # fmt: skip
INNER = "parallel.inner_shard=2"
ONCE = ("precision.reduce=bf16", "batch.micro_size=2")  # one micro-batch, and sums in 16 bits, as the paper counts
ALL = (*ONCE, INT8, INNER, "parallel.quantize_reduce=int4")
COUNTED = [
    ("bf16", ()),
    ("bf16", (INT8,)),
    ("fp32", ()),
    ("fp32", (INT8,)),
    ("bf16", (INNER,)),
    ("bf16", (INT8, INNER)),
]
COUNTED += [("bf16", ONCE), ("bf16", ALL)]
BLOCK = 1 + 4 / 256  # bytes of a number in codes


class Counted(NamedTuple):
    """`held`: bytes of copies in the last backward; `parts`: those of each part that is gathered, padded; `coded`: as codes of 8 bits;
    `summed`: as sums in codes of 4."""

    crossed: Crossed
    held: int
    parts: list[int]
    coded: list[int]
    summed: list[int]


def count_gathers(workers: Workers, configs: list[TrainConfig]) -> list[Counted]:
    mesh = make_mesh(configs[0].parallel, workers)
    return [count_on(mesh, config) for config in configs]


def count_on(mesh: Mesh, config: TrainConfig) -> Counted:
    """What the second step of a run moves."""
    built = assemble_run(config, mesh)
    update = make_update(config, mesh, built.engine, built.optimizer, built.sparsity)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    batches = train_batches(config, mesh, data, position=0)
    update(step_input(config, 1, next(batches)))
    built.optimizer.zero_grad()
    held, gathers = [0], getattr(built.model, gather._HANDLE, ())
    next(built.model.parameters()).register_post_accumulate_grad_hook(
        lambda p: held.append(sum(g.copy.nbytes for g in gathers if g.copy is not None))
    )
    with crossings(machine=2) as crossed:
        update(step_input(config, 2, next(batches)))
    assert not any(g.copy is not None for g in gathers)
    dtype = compute_dtype(config.precision)
    shapes = [padded_shapes(module) for module in sharded_parts([built.model])]
    forms = [RowMessages(part, dtype, 8) for part in shapes]
    parts, coded = [4 * form.numbers * dtype.itemsize for form in forms], [4 * form.bytes for form in forms]
    summed = [4 * RowMessages(part, torch.float32, 4).bytes for part in shapes]
    return Counted(crossed, max(held), parts, coded, summed)


@pytest.fixture(scope="module")
def counts(ranks, folder, full) -> dict[tuple[str, tuple[str, ...]], Counted]:
    found = {}
    for inner in (False, True):
        cases = [case for case in COUNTED if (INNER in case[1]) == inner and (full or case[0] == "bf16")]
        overrides = [small_config(folder, *SHAPE, f"precision={name}", *options) for name, options in cases]
        configs = [with_layout(config, 4, zero=3) for config in overrides]
        found |= dict(zip(cases, ranks.run(count_gathers, 4, configs)[0], strict=True))
    return found


@pytest.mark.parametrize(("name", "width"), [("bf16", 2), pytest.param("fp32", 4, marks=pytest.mark.full)])
def test_codes_take_half_of_16_bits_and_a_quarter_of_32(counts, name, width):
    """In each of two micro-batches parts are gathered for the forward and for the backward; the last, which stays between, once, and
    once more as the step ends."""
    plain, coded = counts[name, ()], counts[name, (INT8,)]
    assert plain.crossed.gathered_outside == 4 * sum(plain.parts) - plain.parts[-1]
    assert coded.crossed.gathered_outside == 4 * sum(coded.coded) - coded.coded[-1]
    assert coded.crossed.gathered_outside == pytest.approx(plain.crossed.gathered_outside * BLOCK / width, rel=0.015)


def test_copies_take_gathers_off_the_outer_axis(counts):
    """All but the first of a step; and a rank holds its share of the 16-bit weights."""
    plain, copied, both = counts["bf16", ()], counts["bf16", (INNER,)], counts["bf16", (INT8, INNER)]
    weights = sum(plain.parts)
    assert copied.crossed.gathered_outside == weights
    assert copied.crossed.gathered_outside + copied.crossed.gathered_inside == plain.crossed.gathered_outside
    assert both.crossed.gathered_outside == sum(both.coded) == pytest.approx(weights * BLOCK / 2, rel=0.01)
    assert both.crossed.gathered_inside == copied.crossed.gathered_inside
    assert copied.held == both.held == weights // 2


def test_all_three_move_a_quarter_over_the_outer_axis(counts):
    """3 M, of two gathers and a reduction, become M / 2, nothing and M / 4, and the scales: what the paper counts for a machine, of
    which each of two ranks sums a half between machines."""
    plain, three = counts["bf16", ONCE], counts["bf16", ALL]
    weights = sum(plain.parts)
    assert (plain.crossed.gathered_outside, plain.crossed.reduced_outside) == (2 * weights - plain.parts[-1], weights)
    gathered, reduced = three.crossed.gathered_outside, 2 * three.crossed.reduced_outside
    assert gathered == sum(three.coded) == pytest.approx(weights * (1 / 2 + 2 / 256), rel=0.01)
    assert reduced == sum(three.summed) == pytest.approx(weights * (1 / 4 + 2 / 256), rel=0.03)  # vectors are whole
    assert 3.8 < 3 * weights / (gathered + reduced) < 3.9
