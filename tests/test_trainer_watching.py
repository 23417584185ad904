"""What is watched of a run beside its losses: norms of parameters and the operations of a step, alike on every layout."""

from pathlib import Path

import pytest
import torch

from parity import TOLERANCE, global_batch, plain_model, run_plain, small_config, with_layout
from rowwise.kernels.visible import Documents
from rowwise.trainer.data.batches import MicroBatch, visible_pairs
from rowwise.trainer.data.open import open_data
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import ModelConfig, flops_of, flops_per_token, parameter_count
from rowwise.trainer.norms import KINDS
from runs import named, run_train

LAYOUTS = {
    "1": (1, {}),
    "3, stage 3": (3, {"zero": 3}),
    "stages": (4, {"pipeline": 2, "pipeline_schedule": "zb_h1", "zero": 2, "post_validation": True}),
    "2 x 2 of a sequence": (4, {"ring": 2, "replicate": 2, "zero": 0}),
}
OPTIONS = ["steps=3", "batch.micro_size=4", "log.norms_every=2", "peak_flops=1e9", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("watching")


def made(ranks, folder, layout: str, *overrides: str) -> tuple:
    """(configuration, records) of a run on that layout."""
    world, degrees = LAYOUTS[layout]
    name = f"{layout}-{len(overrides)}"
    config = named(with_layout(small_config(folder, *OPTIONS, *overrides), world, **degrees), folder, name)
    ranks.run(run_train, world, config)
    return config, read_metrics(Path(config.run_dir))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_record_has_the_textbooks_norms_and_operations_on_every_layout(ranks, folder, layout):
    config, records = made(ranks, folder, layout)
    assert [any(kind in record for kind in KINDS) for record in records] == [False, True, False]
    trace = run_plain(config)
    initial = {name: p.detach() for name, p in plain_model(config).named_parameters()}
    factor = min(1.0, config.clip_norm / trace.norms[1])
    assert factor < 1, "nothing is clipped: the test would not see it"
    for name, start in initial.items():
        expected = {
            "parameter_norms": (start + trace.updates[0][name] + trace.updates[1][name]).norm(),
            "gradient_norms": trace.gradients[1][name].norm() / factor,
            "update_norms": trace.updates[1][name].norm(),
        }
        for kind, norm in expected.items():
            assert records[1][kind][name] == pytest.approx(float(norm), rel=TOLERANCE), (kind, name)
    assert all(records[1][kind].keys() == initial.keys() for kind in KINDS)
    squares = sum(norm**2 for norm in records[1]["gradient_norms"].values())
    assert squares**0.5 == pytest.approx(records[1]["grad_norm"], rel=TOLERANCE)
    # The pairs of a token and a not later one of its own document, counted one by one.
    data, tokens = open_data(config.data, 13, config.model.vocab_size), 24 * 13
    earlier = torch.ones(13, 13, dtype=torch.bool).tril()
    for step, record in enumerate(records):
        begins = global_batch(config, data, step).documents.begins
        inside = [torch.bincount(torch.tensor(row[1:], dtype=torch.long), minlength=13).cumsum(0) for row in begins]
        pairs = sum(int(((place[:, None] == place) & earlier).sum()) for place in inside)
        assert pairs < 0.9 * 24 * 13 * 14 / 2
        counted = record["mfu"] * config.peak_flops * record["step_seconds"] * LAYOUTS[layout][0]
        assert counted == pytest.approx(flops_of(config.model, tokens, pairs), rel=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [["optim=dct", "optim.rank=4"], ["sparsity=rigl", "sparsity.update_every=2", "sparsity.stop_at=3"]],
    ids=["low rank", "masks"],
)
def test_norms_of_other_rules_are_the_same_on_every_layout(ranks, folder, options):
    alone, split = (made(ranks, folder, layout, *options)[1][1] for layout in ("1", "3, stage 3"))
    for kind in KINDS:
        assert split[kind] == pytest.approx(alone[kind], rel=TOLERANCE)
        assert all(norm > 0 for norm in alone[kind].values())


def test_a_step_without_an_update_has_no_norm_of_one(ranks, folder):
    """After an overflow of fp16: nothing changed, and the gradient is no number."""
    options = ("precision=fp16", "precision.initial_scale=1e30", "log.norms_every=1", "steps=1")
    _, (record,) = made(ranks, folder, "1", *options)
    assert record["grad_norm"] is None and "gradient_norms" not in record
    assert set(record["update_norms"].values()) == {0.0}
    assert all(record["parameter_norms"].values())


def test_pairs_are_those_that_attention_sees():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    whole = MicroBatch(tokens, tokens, tokens, None)
    assert visible_pairs([whole], 5) == 2 * 15
    packed = MicroBatch(tokens, tokens, tokens, Documents(((0, 2), (0, 1, 4))))
    assert visible_pairs([packed, whole], 5) == (3 + 6) + (1 + 6 + 1) + 30


def test_operations_of_a_whole_sequence_are_those_of_its_tokens():
    config = ModelConfig()
    assert flops_of(config, 13, 13 * 14 / 2) == pytest.approx(13 * flops_per_token(config, 13))
    _, multiplying = parameter_count(config)
    # A token alone: two operations a weight forward, four backward; of attention, q k and p v of one pair, thrice.
    attention = 3 * (2 * 2) * config.layers * config.heads * config.head_size
    assert flops_of(config, 1, 1) == 6 * multiplying + attention
