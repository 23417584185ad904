"""What a pipeline holds and sends, counted while it runs: activations as the checker says, gathers as the plan says. (Law 4.)"""

import itertools
from statistics import median

import pytest
import torch

from live_bytes import LiveBytes
from messages import Messages
from parity import engine_on, small_config, with_layout
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.pipeline_schedule.generate import Shape, blockwise, units
from rowwise.parallel.pipeline_schedule.simulate import Costs, gathers, peak_activations
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches

MICRO_BATCHES = 8


class Watched(Trace):
    """A trace that looks at the live bytes after every action."""

    def __init__(self, live: LiveBytes, device: torch.device):
        super().__init__(device)
        self.bytes: list[int] = []
        self._live = live

    def add(self, *marked):
        super().add(*marked)
        self.bytes.append(self._live.now())


def watch(workers, config):
    """(this rank's actions, live bytes after each beyond those before the first), in the second step."""
    mesh = make_mesh(config.parallel, workers)
    engine = engine_on(mesh, config)
    batches = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    engine.forward_backward(next(batches), 1.0)
    micro_batches = next(batches)
    with LiveBytes(peaks=False) as live:
        watched = Watched(live, mesh.device)
        engine.forward_backward(micro_batches, 1.0, watched)
    return [action for action, _, _ in watched.spans()], watched.bytes


def held_bytes(actions, live: list[int]) -> Costs:
    """What a micro-batch leaves on each stage of this rank after F and after I: medians, since messages come early."""
    changes: dict[tuple[int, str], list[int]] = {}
    for action, before, after in zip(actions, [0, *live], live, strict=False):
        changes.setdefault((action.stage, action.kind), []).append(after - before)
    held = tuple(float(median(changes.get((stage, "F"), [0]))) for stage in range(8))
    kept = tuple(held[stage] + median(changes.get((stage, "I"), [0])) for stage in range(8))
    zeros = (0.0,) * 8
    return Costs(zeros, zeros, zeros, zeros, held, kept)


def without_messages(actions, live: list[int], own: set[int], boundary: int) -> list[int]:
    """`live` less what was sent to other ranks: gloo keeps it until the end."""
    sent, rest = 0, []
    for action, bytes_ in zip(actions, live, strict=True):
        target = action.stage + {"F": 1, "I": -1, "B": -1, "W": 9}[action.kind]
        sent += 0 <= target < 8 // (1 if len(own) == 2 else 2) and target not in own
        rest.append(bytes_ - sent * boundary)
    return rest


@pytest.mark.parametrize(
    "name, chunks",
    [("gpipe", 1), ("1f1b", 1), ("zb_h2", 1), ("zb_v", 2), ("blockwise", 2),
     *(pytest.param(*case, marks=pytest.mark.full) for case in (("gpipe", 2), ("interleaved_1f1b", 2), ("zb_h1", 1)))],
)  # fmt: skip
def test_activations_are_what_the_checker_says(ranks, tmp_path, name, chunks):
    config = small_config(
        tmp_path, f"model.layers={4 * chunks}", "model.dim=24", "model.ffn_dim=96", "model.heads=2", "batch.global_size=16",
        "batch.micro_size=2", "batch.seq_len=32",
    )  # fmt: skip
    config = with_layout(config, 4, pipeline=4, pipeline_schedule=name, virtual_stages=chunks, zero=0)
    boundary = 2 * 32 * 24 * 8  # bytes of what crosses from stage to stage
    for actions, bytes_ in ranks.run(watch, 4, config):
        live = without_messages(actions, bytes_, {action.stage for action in actions}, boundary)
        costs = held_bytes(actions, live)
        expected = peak_activations(actions, costs)
        assert min(held for held in costs.held if held) > 20 * boundary, "too small for a micro-batch more to be seen"
        assert abs(max(live) - expected) <= 5 * boundary, (max(live), expected)  # messages that came early
        assert live[-1] <= 5 * boundary, "something is left"


def count_gathers(workers, config):
    """(all-gathers in one step, groups of parameters of each stage)."""
    mesh = make_mesh(config.parallel, workers)
    engine = engine_on(mesh, config)
    batches = train_batches(config, mesh, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    engine.forward_backward(next(batches), 1.0)
    with Messages() as messages:
        engine.forward_backward(next(batches), 1.0)
    return messages.calls, {stage: len(decoder.parts()) for stage, decoder in engine.model.decoders.items()}


@pytest.mark.parametrize("unit", [2, 4])
def test_blockwise_gathers_once_a_unit_and_pass(ranks, tmp_path, unit):
    """Weights cross ranks once for the forwards of a unit on a chunk and once for its input gradients; where one follows
    the other, once for both. Gradients cross once a step."""
    config = small_config(
        tmp_path, "model.layers=4", "model.dim=12", "model.heads=2", "batch.global_size=16", "batch.micro_size=1"
    )
    layout = {"pipeline": 2, "virtual_stages": 2, "zero": 3, "pipeline_schedule": "blockwise", "pipeline_unit": unit}
    plan = blockwise(Shape(2, 2, MICRO_BATCHES, unit))
    rounds = len(units(MICRO_BATCHES, unit))
    for rank, (calls, parts) in enumerate(ranks.run(count_gathers, 4, with_layout(config, 4, **layout))[::2]):
        runs = [plan.ranks[rank][position].stage for position in gathers(plan.ranks[rank], "run")]
        assert len(runs) == 1 + 2 * rounds  # 2 chunks: to the second and back for each unit
        assert calls["_allgather_base_"] == sum(parts[stage] for stage in runs)
        assert calls["_reduce_scatter_base_"] == sum(parts.values())


def test_other_schedules_gather_for_every_micro_batch(ranks, tmp_path, full):
    config = small_config(
        tmp_path, "model.layers=8", "model.dim=12", "model.heads=2", "batch.global_size=8", "batch.micro_size=1"
    )
    for name, chunks in (("1f1b", 1), ("blockwise", 2), *[("interleaved_1f1b", 2), ("zb_v", 2)] * full):
        layout = {"pipeline": 2, "virtual_stages": chunks, "zero": 3, "pipeline_schedule": name}
        layout["pipeline_gather"] = "micro_batch"
        for calls, parts in ranks.run(count_gathers, 4, with_layout(config, 4, **layout))[::2]:
            groups = sum(parts.values())
            # Forward and backward each; the last part of a stage stays whole between them, and prefetching saves some.
            least, most = 4 * (2 * groups - 2 * len(parts)), 4 * 2 * groups
            assert least <= calls["_allgather_base_"] <= most
            assert calls["_reduce_scatter_base_"] == groups


@pytest.mark.parametrize("zero", [1, 2])
def test_below_stage_3_weights_are_gathered_once_a_step(ranks, tmp_path, zero):
    config = small_config(
        tmp_path, "model.layers=4", "model.dim=12", "model.heads=2", "batch.global_size=8", "batch.micro_size=1"
    )
    layout = {"pipeline": 2, "virtual_stages": 2, "zero": zero, "pipeline_schedule": "interleaved_1f1b"}
    counted = [calls for calls, _ in ranks.run(count_gathers, 4, with_layout(config, 4, **layout))]
    for calls in counted:
        assert calls["_allgather_base_"] == calls["_reduce_scatter_base_"] > 0
    assert len({tuple(sorted(c.items())) for c in itertools.islice(counted, 2)}) == 1
