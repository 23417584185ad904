"""The stable embedding layer of the 8-bit optimizers: what it computes and starts from, against its authors' layer."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from parity import small_config
from rowwise.launch.export import ExportConfig, export
from rowwise.optim.build import build_optimizer
from rowwise.optim.quantized import AdamW8bitConfig
from rowwise.trainer.check import check
from rowwise.trainer.models.decoder import (
    Decoder,
    ModelConfig,
    parameter_count,
    parameter_specs,
)
from rowwise.trainer.models.ends import StableEmbedding
from rowwise.trainer.models.init import random_rows
from rowwise.trainer.resume import completed, model_facts
from runs import run_train

SHAPE = {"layers": 1, "dim": 64, "heads": 2, "kv_heads": 1, "ffn_dim": 72, "vocab_size": 96}
CONFIG = ModelConfig(**SHAPE, stable_embedding=True)
# bitsandbytes 0.50.2, nn.StableEmbedding(5, 4) of row i = (i, i^2, 1, -i) / 4, norm.weight = (1, 2, 3, 4) / 2 and
# norm.bias = (0, 1, 0, -1), of the tokens 3, 0, 4.
THEIRS = [
    [0.05773478, 2.50110435, -0.51961303, -3.54033041],
    [-0.28855208, 0.42289585, 2.59696865, -2.15420818],
    [-0.01698086, 2.59620118, -0.66225368, -3.24147415],
]


def filled():
    layer = StableEmbedding(5, 4)
    i = torch.arange(5.0)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([i, i * i, torch.ones(5), -i], dim=1) / 4)
        layer.norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]) / 2)
        layer.norm.bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
    return layer


def test_it_computes_what_its_authors_layer_does():
    layer, tokens = filled(), torch.tensor([3, 0, 4])
    assert [name for name, _ in layer.named_parameters()] == ["weight", "norm.weight", "norm.bias"]
    torch.testing.assert_close(layer(tokens), torch.tensor(THEIRS), rtol=1e-5, atol=1e-6)
    e = layer.weight[tokens].double()
    e = (e - e.mean(1, keepdim=True)) / (e.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = e * layer.norm.weight.double() + layer.norm.bias.double()
    torch.testing.assert_close(layer.double()(tokens), expected, rtol=1e-12, atol=0)


def test_its_norm_is_made_in_float32():
    layer, tokens = filled(), torch.arange(5)
    layer.bfloat16()
    y = layer(tokens)
    assert y.dtype == torch.bfloat16
    wide = nn.functional.layer_norm(layer.weight.float(), (4,), layer.norm.weight.float(), layer.norm.bias.float())
    assert torch.equal(y, wide.bfloat16())


def test_it_starts_xavier_uniform_wherever_its_rows_are():
    fill_, whole = random_rows(parameter_specs(CONFIG), 3), torch.empty(96, 64)
    fill_("embed.weight", whole, 0, 96)
    half = math.sqrt(6 / (96 + 64))
    assert 0.99 * half < whole.abs().max() <= half and whole.mean().abs() < 0.02 * half
    assert whole.std().item() == pytest.approx(half / math.sqrt(3), rel=0.02)
    part = torch.empty(30, 64)
    fill_("embed.weight", part, 41, 96)
    assert torch.equal(part, whole[41:71])
    scale, shift = torch.empty(64), torch.empty(64)
    fill_("embed.norm.weight", scale, 0, 64)
    fill_("embed.norm.bias", shift, 0, 64)
    assert (scale == 1).all() and (shift == 0).all()
    other = torch.empty(96, 64)
    fill_("head.weight", other, 0, 96)
    assert other.std().item() == pytest.approx(CONFIG.init_std, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_counted_and_its_states_have_32_bits(tied):
    config = ModelConfig(**SHAPE, stable_embedding=True, tie_embeddings=tied)
    plain = ModelConfig(**SHAPE, tie_embeddings=tied)
    assert parameter_count(config)[0] == parameter_count(plain)[0] + 2 * 64
    assert parameter_specs(config)["embed.norm.bias"].shape == (64,)
    model = Decoder(config)
    optimizer = build_optimizer(model, AdamW8bitConfig())
    for p in model.embed.parameters():
        assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"}
        assert all(state.dtype == torch.float32 for state in optimizer.state[p].values())
    logits = model(torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)[None])
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.embed.parameters())


def test_a_run_learns_and_its_export_is_refused(ranks, tmp_path):
    overrides = ("model.stable_embedding=true", "optim=adamw8bit", "steps=2", "parallel.shard=1")
    config = small_config(tmp_path, *overrides, f"run_dir={tmp_path / 'run'}")
    check(config, 1)
    ranks.run(run_train, 1, config)
    with pytest.raises(
        ValueError, match=r"model.stable_embedding=true, and no model of transformers has a norm .*train one"
    ):
        export(ExportConfig(run=str(tmp_path / "run"), to=str(tmp_path / "to")))
    assert not Path(tmp_path / "to").exists()


def test_checkpoints_of_before_have_none(tmp_path):
    config = small_config(tmp_path)
    assert model_facts(config)["model.stable_embedding"] is completed({}, config)["model.stable_embedding"] is False
