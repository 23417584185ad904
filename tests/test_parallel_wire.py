"""What gloo hides and NCCL does not: results that are read before they were waited for, and orders that do not match."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parity import (
    TOLERANCE,
    assert_all_same,
    engine_on,
    in_micro_batches,
    run_layouts,
    run_plain,
    small_config,
    step_input,
    with_layout,
)
from rowwise.optim.build import build_optimizer
from rowwise.parallel.config import ParallelConfig, resolve_degrees
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.update import make_update
from wire import Begin, Part, Wait, Wire, held_up

MODEL = ("model.dim=12", "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "model.ffn_dim=9", "model.layers=2",
         "batch.global_size=8", "batch.micro_size=1")  # fmt: skip
PIPELINED = {"pipeline": 2, "zero": 1}
TIED, FOUR = ("model.tie_embeddings=true",), ("model.layers=4",)
FEW = ("batch.global_size=4",)  # of a pipeline, which has small ones: as many of a rank as ranks, or twice as many


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("wire")


def late_steps(workers, configs):
    """Two steps of each; what was begun and waited for."""
    with Wire() as wire:
        traces = run_layouts(workers, configs, steps=2)
    return traces, wire.log


LAYOUTS = [
    (2, {"zero": 0}, ()),
    (2, {"zero": 1}, ("optim=muon", "optim.lr=0.01")),
    (2, {"zero": 2}, ("optim=fira", "optim.rank=4", "optim.lr=0.01")),
    (4, {"replicate": 2, "zero": 3}, ("optim=adafactor", "optim.lr=0.01")),
    *((2, {"ring": 2, "ring_order": order}, ()) for order in ("zigzag", "striped")),
    (4, {"ulysses": 2, "ring": 2, "zero": 3}, ()),
    (4, {"zero": 3, "quantize_gather": "int8", "inner_shard": 2}, ()),
    *((2, PIPELINED | {"pipeline_schedule": name}, (*TIED, *FEW)) for name in ("1f1b", "zb_h2")),
    (2, PIPELINED | {"pipeline_schedule": "interleaved_1f1b", "virtual_stages": 2}, (*FOUR, *FEW)),
    (
        4,
        PIPELINED | {"pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 3},
        (*TIED, *FOUR, "batch.global_size=6"),
    ),
    (4, PIPELINED | {"pipeline_schedule": "blockwise", "virtual_stages": 2, "zero": 3}, (*FOUR, *FEW)),
]
# Two that send what 1f1b and zb_h2 send, in orders that are between others'; and an order of a ring that sends as zigzag does.
FULL = [
    (2, {"ring": 2, "ring_order": "contiguous"}, ()),
    *((2, PIPELINED | {"pipeline_schedule": name}, (*TIED, *FEW)) for name in ("gpipe", "zb_h1")),
]


@pytest.mark.parametrize(
    ("world", "layout", "overrides"),
    [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
    ids=lambda value: str(value),
)
def test_steps_with_late_messages_in_queues(ranks, folder, world, layout, overrides):
    """The law holds where nothing may be read before it was waited for, and no rank would wait for ever."""
    config = with_layout(small_config(folder, *MODEL, *overrides), world, **layout)
    if config.parallel.pipeline == 1:
        config = in_micro_batches(config, 2)
    answers = ranks.run(late_steps, world, [config])
    assert_all_same([traces[0] for traces, _ in answers], run_plain(config, steps=2))
    assert held_up({rank: log for rank, (_, log) in enumerate(answers)}) == []


def late_updates(workers, config):
    """Two updates as a run makes them, the second begun before the first is known to be good where that may be."""
    mesh = make_mesh(config.parallel, workers)
    engine = engine_on(mesh, config)
    optimizer = build_optimizer(engine.model, config.optim, config.seed)
    update = make_update(config, mesh, engine, optimizer, None)
    stream = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    first, second = next(stream), next(stream)
    with Wire() as wire:
        ahead = second if config.parallel.post_validation else None
        reports = [update(step_input(config, 1, first, ahead=ahead))]
        optimizer.zero_grad()
        reports.append(update(step_input(config, 2, second)))
    return reports, wire.log


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        (("clip_norm=0.5", *FEW), PIPELINED | {"pipeline_schedule": "zb_h1", "post_validation": True}),
        (("clip_norm=1e9", *FEW), PIPELINED | {"pipeline_schedule": "zb_h2", "post_validation": True}),
        (("optim.in_backward=true", "clip_norm=0", "batch.micro_size=4"), {"zero": 0}),
    ],
    ids=["undone", "kept", "in_backward"],
)
def test_updates_with_late_messages(ranks, folder, overrides, layout):
    """Both updates report what one process finds."""
    config = small_config(folder, *MODEL, *overrides)
    answers = ranks.run(late_updates, 2, with_layout(config, 2, **layout))
    plain = run_plain(config, steps=2)
    for reports, _ in answers:
        np.testing.assert_allclose([report.loss for report in reports], plain.losses, rtol=TOLERANCE)
        np.testing.assert_allclose([report.grad_norm for report in reports], plain.norms, rtol=TOLERANCE)
    assert held_up({rank: log for rank, (_, log) in enumerate(answers)}) == []


def a_read_before_the_wait(workers):
    """Reads what it should have waited for; the second sends what it changes meanwhile."""
    mesh = make_mesh(resolve_degrees(ParallelConfig(), 2), workers)
    with Wire():
        x = torch.ones(3)
        work = dist.all_reduce(x, async_op=True)
        early = x.clone()
        work.wait()
        sent = torch.ones(2)
        work = dist.isend(sent, 1) if mesh.rank == 0 else dist.irecv(sent, 0)
        if mesh.rank == 0:
            sent.zero_()
        try:
            work.wait()
            complaint = ""
        except AssertionError as error:
            complaint = str(error)
    return early, x, complaint


def test_what_is_late_cannot_be_read_early_nor_changed(ranks):
    (early, late, complaint), _ = ranks.run(a_read_before_the_wait, 2)
    assert early.isnan().all() and late.tolist() == [2, 2, 2]
    assert "changed while it was sent" in complaint


def exchange(workers, together):
    """Both ranks send first, which gloo forgives; or both at once."""
    make_mesh(resolve_degrees(ParallelConfig(), 2), workers)
    sides, there = [(dist.isend, torch.ones(1)), (dist.irecv, torch.empty(1))], 1 - workers.rank
    with Wire() as wire:
        if together:
            works = dist.batch_isend_irecv([dist.P2POp(side, tensor, there) for side, tensor in sides])
        else:
            works = [side(tensor, there) for side, tensor in sides]
        for work in works:
            work.wait()
    return wire.log


def test_two_that_send_to_each_other_first_are_held_up(ranks):
    assert held_up(dict(enumerate(ranks.run(exchange, 2, True)))) == []
    assert len(held_up(dict(enumerate(ranks.run(exchange, 2, False))))) == 2


def log_of(rank: int, *steps: str) -> list[Begin | Wait]:
    """`a` begins a sum in group a, `A` one in the same group of other numbers; `a.` waits for that of group a."""
    numbers = {step.lower(): number for number, step in enumerate(steps) if not step.endswith(".")}
    return [
        Wait(numbers[step[0].lower()])
        if step.endswith(".")
        else Begin(numbers[step.lower()], (step.lower(),), (Part(("allreduce", step), (1 - rank,)),))
        for step in steps
    ]


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        (["a", "b", "a.", "b."], ["b", "a", "b.", "a."], True),  # queues of their own
        (["a", "a.", "b", "b."], ["b", "b.", "a", "a."], False),
        (["a", "a.", "b", "b."], ["b", "a", "b.", "a."], True),
        (["a", "a."], ["A", "a."], False),
        (["a", "a.", "b"], ["a", "a."], False),
    ],
)
def test_sums_that_nccl_would_wait_for(first, second, ends):
    assert (held_up({0: log_of(0, *first), 1: log_of(1, *second)}) == []) is ends
