"""Ranks that connect at their first message have all connected when a run begins."""

from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from parity import engine_on, run_on, small_config, with_layout
from rowwise.parallel import lanes
from rowwise.parallel.lanes import neighbours, numbered
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.torch_c10d import all_groups
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import open_data
from rowwise.trainer.evaluate import evaluate
from rowwise.trainer.feed import eval_batches
from rowwise.trainer.sample import generate
from wire import Begin, Log, Wire

MODEL = ("model.dim=12", "model.heads=4", "model.kv_heads=2", "model.head_dim=6", "model.ffn_dim=9", "model.layers=2",
         "batch.global_size=4", "batch.micro_size=1", "eval.batches=1", "optim=muon", "optim.lr=0.01")  # fmt: skip
TIED, FOUR = ("model.tie_embeddings=true",), ("model.layers=4",)


def communicators(log: Log) -> list[tuple]:
    """What NCCL would have connected, in this order: a group for its collectives and batches, and for single messages the
    two ranks of each, apart for each lane."""
    made = []
    for entry in log:
        if isinstance(entry, Begin):
            alone = [part.what[1] for part in entry.parts if part.what[0] in ("send", "recv") and len(entry.parts) == 1]
            made.append((*entry.queue, *(tuple(sorted(pair)) for pair in alone)))
    return list(dict.fromkeys(made))


def connected(workers, config: TrainConfig):
    """What is connected once the mesh is made, once the model is, and after all that a run does; and the group of the
    thread that saves, which is gloo's everywhere."""
    with Wire() as wire, mock.patch.object(lanes, "connects_late", lambda _: True):
        mesh = make_mesh(config.parallel, workers)
        on_mesh = communicators(wire.log)
        engine = engine_on(mesh, config)
        built = communicators(wire.log)
        run_on(mesh, config, steps=1)
        data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
        evaluate(engine, eval_batches(config, mesh, data))
        generate(engine, [1, 2, 3], 1, 0.0, config.batch.seq_len, 0, mesh)
        groups = [tuple(dist.get_process_group_ranks(group)) for group in all_groups()]
    save_group = mesh.save_group.group_name
    everything = [used for used in communicators(wire.log) if used[0] != save_group]
    return on_mesh, [used for used in built if used[0] != save_group], everything, groups


LAYOUTS = [
    (2, {"zero": 0}, ()),
    (4, {"replicate": 2, "zero": 3}, ()),
    (4, {"ulysses": 2, "ring": 2, "zero": 2}, ()),
    (4, {"zero": 3, "inner_shard": 2, "quantize_reduce": "int4"}, ("precision=fp32",)),
    (
        4,
        {"pipeline": 2, "zero": 3, "pipeline_schedule": "zb_v", "virtual_stages": 2},
        (*TIED, *FOUR, "batch.global_size=6"),
    ),
    (4, {"pipeline": 4}, (*TIED, *FOUR)),
    (4, {"pipeline": 2, "ulysses": 2, "pipeline_schedule": "interleaved_1f1b", "virtual_stages": 2}, (*TIED, *FOUR)),
    (2, {"pipeline": 2, "pipeline_schedule": "auto"}, ()),
]


@pytest.mark.parametrize(("world", "layout", "overrides"), LAYOUTS, ids=lambda value: str(value))
def test_nothing_connects_once_a_run_has_begun(ranks, tmp_path: Path, world, layout, overrides):
    config = with_layout(small_config(tmp_path, *MODEL, *overrides), world, **layout)
    answers = ranks.run(connected, world, config)
    for on_mesh, built, everything, _ in answers:
        assert on_mesh
        assert set(everything) <= set(built), "connects with messages awaited"
        # What only the model's build can know: the ends of a tied embedding, which may be no neighbours.
        assert len(set(built) - set(on_mesh)) <= (2 if layout == {"pipeline": 4} else 0)
    in_one_order(answers)


def in_one_order(answers) -> None:
    """Ranks that share communicators, or groups, make them in the same order: else they would wait in a circle."""
    for what in (1, 3):
        for one in answers:
            for other in answers:
                shared = set(one[what]) & set(other[what])
                assert [x for x in one[what] if x in shared] == [x for x in other[what] if x in shared]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_lanes_that_share_a_rank_have_numbers_of_their_own(size):
    before = numbered(neighbours(size), {})
    numbers = numbered({(0, size - 1), (size - 1, 0)}, before)
    assert before.items() <= numbers.items()
    for one, number in numbers.items():
        assert all(numbers[other] != number for other in numbers if other != one and set(one) & set(other))
