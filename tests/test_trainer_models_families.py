"""Families of models against transformers' own on the same random weights: logits, gradients, folders both ways, what is generated."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_models_decoder import TOLERANCE, our_logits, some_tokens, their_logits
from torch import Tensor

from parity import relative_error
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.keys import as_lists
from rowwise.trainer.models.config import ModelConfig, plain_of
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import Decoder, check_model, parameter_count, parameter_specs
from rowwise.trainer.models.families.keys import family_of
from rowwise.trainer.models.families.table import FAMILIES
from rowwise.trainer.models.huggingface import check_source, rows_from, write_folder
from rowwise.trainer.models.rope import LinearScaling, LongRopeScaling, YarnScaling

# Sizes that no power of two divides; three layers, so that patterns go round unevenly.
ODD = {"layers": 3, "dim": 30, "heads": 3, "kv_heads": 1, "ffn_dim": 37, "vocab_size": 61}
THEIRS = {
    "num_hidden_layers": 3, "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 37,
    "vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
SHORT, LONG = (1.0, 1.5, 2.0, 2.5, 3.0), (2.0, 4.0, 6.0, 8.0, 10.0)
NORMED_AFTER = {"norms": "after", "qk_norm": True, "qk_norm_over": "all"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG), "rope_theta": 1e4,
    "original_max_position_embeddings": 56,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its class in transformers, what its configuration has beside THEIRS, written down by hand; what ours has beside
    ODD."""

    kind: str
    theirs: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**ODD | {"norm_eps": 1e-6} | self.ours)


def longrope(**keys: Any) -> LongRopeScaling:
    return LongRopeScaling(SHORT, LONG, attention_factor=(1 + keys.pop("log") / 4.02535169073515) ** 0.5, **keys)


CASES = {
    "llama biased": Case("Llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    "llama linear": Case(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}, "tie_word_embeddings": True},
        {"rope_scaling": LinearScaling(2.5), "tie_embeddings": True},
    ),
    "llama yarn": Case(
        "Llama", {"rope_parameters": YARN}, {"rope_scaling": YarnScaling(4.0, 16, 0.1 * 1.3862943611198906 + 1)}
    ),
    "mistral without a window": Case("Mistral", {"sliding_window": None, "head_dim": 14}, {"family": "mistral", "head_dim": 14}),
    "qwen2": Case("Qwen2", {}, {"qkv_bias": True}),
    "qwen2 tied": Case("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_embeddings": True}),
    "qwen3 biased": Case("Qwen3", {"attention_bias": True, "head_dim": 10}, {"qk_norm": True, "qkv_bias": True, "out_bias": True}),
    "olmo2": Case("Olmo2", {"rms_norm_eps": 1e-5}, NORMED_AFTER | {"norm_eps": 1e-5}),
    "olmo2 biased": Case(
        "Olmo2",
        {"attention_bias": True, "num_key_value_heads": 3},
        NORMED_AFTER | {"qkv_bias": True, "out_bias": True, "kv_heads": 3, "norm_eps": 1e-5},
    ),
    "granite": Case(
        "Granite",
        {
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4, "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        {
            "embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.4, "logit_scale": 0.125, "tie_embeddings": True,
        },
    ),
    "granite biased": Case(
        "Granite",
        {"attention_bias": True, "mlp_bias": True, "logits_scaling": 3.0, "attention_multiplier": 0.5},
        {"logit_scale": 1 / 3, "attention_scale": 0.5, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "smollm3": Case(
        "SmolLM3",
        {"no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}},
        {"rope_layers": (True, False), "rope_theta": 2e6, "tie_embeddings": True},
    ),
    "smollm3 biased": Case(
        "SmolLM3",
        {"no_rope_layers": [0, 1, 1], "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False},
        {"rope_layers": (False, True, True), "rope_theta": 2e6, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "phi3": Case("Phi3", {"num_key_value_heads": 3}, {"family": "phi3", "kv_heads": 3, "norm_eps": 1e-5}),
    "phi3 longrope": Case(
        "Phi3",
        {"rope_parameters": dict(LONGROPE), "original_max_position_embeddings": 56},
        {
            "norm_eps": 1e-5, "family": "phi3",
            "rope_scaling": longrope(original_length=56, factor=64 / 56, log=0.13353139262452257),
        },
    ),
    "phi3 longrope, long and partial": Case(
        "Phi3",
        {
            "rope_parameters": LONGROPE
            | {"short_factor": [1.0, 2.0], "long_factor": [3.0, 5.0], "partial_rotary_factor": 0.4, "attention_factor": 1.2},
            "original_max_position_embeddings": 20,
        },
        {
            "norm_eps": 1e-5, "rope_share": 0.4, "rope_long": True,
            "rope_scaling": LongRopeScaling((1.0, 2.0), (3.0, 5.0), 20, 3.2, 1.2),
        },
    ),
}  # fmt: skip


def transformers_model(case: Case, seed: int = 0) -> Any:
    """transformers' own model, every number random."""
    import transformers

    made = getattr(transformers, f"{case.kind}Config")(**json.loads(json.dumps(THEIRS | case.theirs)))
    made._attn_implementation = "eager"
    model = getattr(transformers, f"{case.kind}ForCausalLM")(made).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.2 + (p.ndim == 1 and "norm" in name))
    return model


def loaded(folder: Path, config: ModelConfig) -> Decoder:
    """Our whole model, from a folder that was checked."""
    check_source(folder, config)
    model, fill_ = Decoder(config), rows_from(folder, parameter_specs(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            for start in range(0, p.size(0), 7):  # as a rank reads its rows
                fill_(name, p[start : start + 7].fill_(torch.nan), start, p.size(0))
    return model


def write(folder: Path, model: Decoder) -> None:
    parameters = dict(model.named_parameters())

    def read_(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(parameters[name].detach())

    values = their_config(model.config, torch.float32, 64, None)
    write_folder(folder, values, parameter_specs(model.config), read_, torch.float32, 12_000)


def our_next(model: Decoder, tokens: Tensor, most: int) -> Tensor:
    """What the model says is likeliest, token by token."""
    for _ in range(most):
        tokens = torch.cat((tokens, our_logits(model, tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_that_of_transformers(tmp_path, name):
    """A folder that transformers wrote says the shape, gives the logits and the gradients; what is written of it opens there, as the
    same model with the same numbers, and says the same."""
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    theirs = transformers_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    source = tmp_path / "theirs"
    words = [f"model.init_from={source}", *(["model.rope_long=true"] if case.config.rope_long else [])]
    read = config_from_tree(compose_tree(words)).model
    assert replace(read, name="tiny", init_from=None) == case.config
    check_model(case.config)
    ours = loaded(source, case.config)
    assert parameter_count(case.config)[0] == sum(p.numel() for p in ours.parameters())

    tokens = some_tokens(case.config)
    logits, reference = ours(tokens, torch.arange(tokens.size(1)).expand_as(tokens)), theirs(tokens).logits
    assert relative_error(logits.detach(), reference.detach()) <= TOLERANCE
    logits.square().mean().backward()
    reference.square().mean().backward()
    names, specs = dict(theirs.named_parameters()), parameter_specs(case.config)
    seen, largest = dict.fromkeys(names, 0), max(float(p.grad.abs().max()) for p in names.values())
    for ours_name, p in ours.named_parameters():
        spec = specs[ours_name]
        gradient = names[spec.theirs].grad[spec.their_row : spec.their_row + p.size(0)]
        if ours_name.endswith("wk.bias") and not case.config.at(int(ours_name.split(".")[1])).rope.size:
            # What all keys have alike moves no softmax.
            assert max(p.grad.abs().max(), gradient.abs().max()) <= 1e-6 * largest
        else:
            assert relative_error(p.grad, gradient) <= 10 * TOLERANCE, ours_name
        seen[spec.theirs] += p.numel()
    assert seen == {name: p.numel() for name, p in names.items()}

    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", ours)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back) is type(theirs)
    for (their_name, p), q in zip(theirs.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q), their_name
    assert torch.equal(their_logits(back, tokens), their_logits(theirs, tokens))
    said = back.generate(tokens[:1, :40], max_new_tokens=8, do_sample=False)
    assert torch.equal(our_next(ours, tokens[:1, :40], 8), said)


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_of_one_family(name):
    """What says it is what it was made of; another family has another shape, or the same."""
    keys = plain_of(CASES[name].config)
    kind = family_of(keys)
    assert FAMILIES[kind].architecture == f"{CASES[name].kind}ForCausalLM"
    assert as_lists(keys) == keys
