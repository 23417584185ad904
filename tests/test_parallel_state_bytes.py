"""What each ZeRO stage holds on a rank: measured after every operation of a step, against the stated formula. (Law 4.)"""

import functools

import pytest

from parity import engine_on, small_config, step_input, with_layout
from rowwise.optim.build import build_optimizer
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.shard import merge_parts
from rowwise.parallel.state_bytes import PeakStates, StateBytes, count_parts, measure, predict
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.step import compute_gradients

# Each operation is measured, so there are few: no documents, three layers.
OVERRIDES = ("precision=fp32", "model.layers=3", "data.mask_documents=false")
KINDS = ("shards", "gathered", "gradients", "optimizer")


def measure_a_step(workers, config):
    """(between steps, peak of each kind, peak of all together, predicted peak)."""
    mesh = make_mesh(config.parallel, workers)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    engine = engine_on(mesh, config)
    model = engine.model
    parts = count_parts(merge_parts(model.parts(), config.parallel.zero))
    optimizer = build_optimizer(model, config.optim)
    batches = next(train_batches(config, mesh, data, position=0))
    with PeakStates(model, optimizer) as states:
        compute_gradients(engine, mesh, step_input(config, 1, batches))
        optimizer.step()
        optimizer.zero_grad()
    return measure(model, optimizer), states.peak, states.total, predict(parts, config.parallel.zero, len(batches))


@pytest.fixture(scope="module")
def measured(ranks, tmp_path_factory):
    """(world size, micro-batches a rank, stage) -> the configuration and what each rank measured, made once."""
    folder = tmp_path_factory.mktemp("bytes")

    @functools.cache
    def measured(world, micro_batches, zero):
        micro_size = 24 // world // micro_batches
        config = small_config(folder, *OVERRIDES, f"batch.micro_size={micro_size}")
        return config, ranks.run(measure_a_step, world, with_layout(config, world, zero=zero))

    return measured


# On two ranks and on three, with one micro-batch and with two: at each stage two of the four, which have every value once.
CASES = [
    pytest.param(world, count, zero, marks=pytest.mark.full if (world + count + zero // 2) % 2 else [])
    for world in (2, 3)
    for count in (1, 2)
    for zero in range(4)
]


@pytest.mark.parametrize(("world", "micro_batches", "zero"), CASES)
def test_bytes_are_those_of_the_formula(measured, zero, world, micro_batches):
    for between, peak, total, predicted in measured(world, micro_batches, zero)[1]:
        buckets = predicted.shards if zero == 0 else 0
        assert between == StateBytes(predicted.shards, 0, buckets, predicted.optimizer, between.buffers)
        for kind in KINDS:
            assert getattr(peak, kind) == pytest.approx(getattr(predicted, kind), rel=0.01), kind
        assert peak.buffers <= predicted.buffers
        assert total <= predicted.total


@pytest.mark.parametrize("zero", [3, *(pytest.param(zero, marks=pytest.mark.full) for zero in (0, 1, 2))])
def test_ranks_that_share_sequences_share_states(ranks, tmp_path, zero):
    """2 shards x 2 ranks of a ring hold what 4 shards would."""
    config = small_config(tmp_path, *OVERRIDES, "model.layers=2", "batch.micro_size=12")
    for between, peak, total, predicted in ranks.run(measure_a_step, 4, with_layout(config, 4, zero=zero, ring=2)):
        assert between.shards == predicted.shards and between.optimizer == predicted.optimizer
        for kind in KINDS:
            assert getattr(peak, kind) == pytest.approx(getattr(predicted, kind), rel=0.01), kind
        assert total <= predicted.total


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_nothing_beyond_the_papers_count_but_a_parameter_shard_and_one_part(measured, zero):
    config, everyone = measured(3, 1 + zero // 2, zero)
    whole, part = _bytes_of(config)
    for rank, (_, peak, _, _) in enumerate(everyone):
        shard, optimizer = peak.shards, peak.optimizer
        paper = {
            0: whole + whole + optimizer,
            1: whole + whole + optimizer,
            2: whole + shard + optimizer,
            3: shard + shard + optimizer,
        }[zero]
        held = peak.shards + peak.gathered + peak.gradients + peak.optimizer
        # The gradient of a tensor; that of a part; that and a gathered part.
        in_flight = {0: part, 1: 0, 2: part, 3: 2 * part}[zero]
        assert held - paper <= (shard if zero in (1, 2) else 0) + in_flight, f"rank {rank}"


def _bytes_of(config) -> tuple[int, int]:
    """(the whole model, its largest part) in float32."""
    import torch

    from rowwise.trainer.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config.model)
    sizes = [sum(4 * p.numel() for module in part for p in module.parameters()) for part in model.parts()]
    return sum(sizes), max(sizes)


def test_half_precision_gathers_half(ranks, tmp_path):
    config = small_config(tmp_path, "precision=bf16", "data.mask_documents=false", "batch.micro_size=6")
    for _, peak, _, _ in ranks.run(measure_a_step, 2, with_layout(config, 2, zero=1)):
        whole, _ = _bytes_of(config)
        assert peak.gathered == whole // 2
        # Accumulated in the float32 they are reduced in, beside one bucket's as the backward left them: all of this model.
        assert peak.gradients == pytest.approx(whole + whole // 2, rel=0.01)
