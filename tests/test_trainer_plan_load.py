"""What of a model does not learn takes less of a step: no gradient of it is made or sent."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.parallel.activations.compress import Tokens
from rowwise.trainer.adapters.convert import adapt
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.models.decoder import Decoder, flops_of
from rowwise.trainer.plan.devices import DEVICES
from rowwise.trainer.plan.forecast import forecast
from rowwise.trainer.plan.load import operations_of

FROZEN = "optim.assign=[{match: '%s', rule: frozen}]"
LEARNING = {  # each with something that learns in front of all layers, so that gradients go back through all
    "everything": [],
    "low-rank matrices": ["adapter=lora", "adapter.rank=3", "adapter.train=[embed.weight]"],
    "triplets": ["adapter=adalora", "adapter.rank=3", "adapter.target_rank=1", "steps=10", "adapter.train=[embed.weight]"],
    "blocks": ["adapter=bone", "adapter.rank=3", 'adapter.layers=["*.attention.*"]', 'adapter.train=["embed.weight"]'],
    "all but some matrices": [FROZEN % "blocks.*.w*"],
    "all but a tied head": [FROZEN % "blocks.0.*", "model.tie_embeddings=true"],
    "all but a head": [FROZEN % "head.*"],
}  # fmt: skip


def operations_made(config) -> int:
    """Counts those of the products that torch makes for 2 x 5 tokens, forward and backward."""

    def attend(q, k, v, documents, look):
        return q + (k + v).repeat_interleave(q.size(2) // k.size(2), 2)

    with torch.device("meta"):
        model, places = Decoder(config.model, attend=attend), torch.arange(0)
        tokens = torch.zeros(2, 5, dtype=torch.long)
    adapt(model, config.adapter, run_specs(config), 0, Tokens(0, places, places))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    return counter.get_total_flops()


def of_vectors(config) -> int:
    """Those that `flops_of` counts of norms, as all that is published does, whatever of a model learns."""
    return 6 * 10 * sum(spec.shape.numel() for spec in run_specs(config).values() if spec.role == "vector")


@pytest.mark.parametrize("words", LEARNING.values(), ids=LEARNING)
def test_operations_are_those_that_torch_makes(tmp_path, words):
    config = with_layout(small_config(tmp_path, *words), 1)
    assert operations_of(config, 10, 0) - of_vectors(config) == operations_made(config) > 0
    assert operations_of(config, 0, 7) == flops_of(config.model, 0, 7)


def test_layers_before_all_that_learn_have_no_backward(tmp_path):
    whole = with_layout(small_config(tmp_path, "model.layers=4"), 1)
    words = "optim.assign=[{match: 'embed.*', rule: frozen}, {match: 'blocks.[01].*', rule: frozen}]"
    some = with_layout(small_config(tmp_path, "model.layers=4", words), 1)
    layer = sum(s.shape.numel() for n, s in run_specs(some).items() if s.role == "hidden" and n.startswith("blocks.0."))
    assert operations_of(some, 1, 0) == operations_of(whole, 1, 0) - 2 * 4 * layer
    assert operations_of(some, 10, 0) - of_vectors(some) == operations_made(some)
    assert operations_of(some, 0, 1) == operations_of(whole, 0, 1) * (1 - 2 / 3 / 2)


def seconds(*words):
    base = ["model=llama3_8b", "precision=bf16", "batch.seq_len=4096", "batch.global_size=16", "batch.micro_size=1"]
    # Machines of one device each, so that every message is seen.
    device = replace(DEVICES["h100"], per_machine=1, network=2e9)
    config = check(config_from_tree(compose_tree([*base, *words])), 8)
    return forecast(config, device).seconds


def test_what_is_frozen_takes_no_gradients_of_the_time_and_codes_are_gathered_in_few_bytes():
    whole, frozen, coded = (
        seconds("parallel.zero=3", *words)
        for words in ([], ["adapter=lora"], ["adapter=lora", "model.frozen_dtype=nf4"])
    )
    # Two of three products, and a thousandth for what is beside them.
    assert frozen.products == pytest.approx(2 / 3 * whole.products, rel=0.06)
    assert frozen.attention == pytest.approx(whole.attention) and frozen.mfu < whole.mfu * whole.step / frozen.step
    # Two gathers of two bytes a number, without a reduction of four.
    assert frozen.messages == pytest.approx(0.5 * whole.messages, rel=0.01)
    assert coded.messages < 0.4 * frozen.messages
    assert coded.elementwise > frozen.elementwise and frozen.optimizer < 0.02 * whole.optimizer


@pytest.mark.parametrize("layout", [["parallel.zero=1"], ["parallel.pipeline=2", "parallel.pipeline_schedule=zb_h1"]])
def test_a_step_with_adapters_is_faster_on_every_layout(layout):
    assert seconds(*layout, "adapter=lora").step < 0.85 * seconds(*layout).step
