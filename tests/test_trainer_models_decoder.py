"""The decoder against transformers' Llama and Qwen3 on the same random weights, and laws of its own."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import relative_error, small_config
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.data.batches import micro_batches
from rowwise.trainer.data.open import open_data
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import Decoder, ModelConfig, check_model, parameter_count, parameter_specs
from rowwise.trainer.models.huggingface import their_shape
from rowwise.trainer.models.rope import Llama3Scaling, rope_frequencies, rope_tables

TOLERANCE = 1e-5
PRESETS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/model").glob("*.yaml"))

# Sizes that no power of two divides, and that 3 ranks share unevenly.
ODD = {"layers": 2, "dim": 30, "heads": 3, "kv_heads": 1, "ffn_dim": 37, "vocab_size": 61}
QWEN3 = ODD | {"heads": 4, "kv_heads": 2, "head_dim": 10, "qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6}
SCALING = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=32)
CASES = {
    "llama": ModelConfig(**ODD),
    "llama without shared keys": ModelConfig(**ODD | {"kv_heads": 3, "norm_eps": 1e-6, "rope_theta": 5e5}),
    "llama tied": ModelConfig(**ODD, tie_embeddings=True),
    "llama scaled": ModelConfig(**ODD, rope_scaling=SCALING),
    "llama with a head dim": ModelConfig(**ODD, head_dim=14),
    "qwen3": ModelConfig(**QWEN3),
    "qwen3 tied": ModelConfig(**QWEN3, tie_embeddings=True),
}
KNOWN_PARAMETERS = {
    # The shapes of Zhao et al., *GaLore*, which calls them 60M, 130M, 350M and 1B.
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_525_120,  # 1,339,082,752 there: its 5,461 hidden units are 5,464 here, as tensor cores like them
    # The model cards, and the sum of the tensors in the published files.
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_4b": 4_022_468_096,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "phi3_mini": 3_821_079_552,
    "phi4_mini": 3_836_021_760,
    "olmo2_1b": 1_484_916_736,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm3_3b": 3_075_098_624,
    "granite3_3_2b": 2_533_539_840,
}


def transformers_model(config: ModelConfig, seed: int = 0) -> Any:
    """transformers' own model of this shape, every number random (the norms' too, so that none can be mistaken for
    another). Its configuration is written down here anew: `their_config` is tested elsewhere."""
    import transformers

    kind = "Qwen3" if config.qk_norm else "Llama"
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    theirs = getattr(transformers, f"{kind}Config")(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(theirs).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.2 + (p.ndim == 1))
    return model


def some_tokens(config: ModelConfig, rows: int = 2, length: int = 50) -> Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def our_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.size(1)).expand_as(tokens))


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case):
    config = CASES[case]
    theirs = transformers_model(config)
    names = dict(theirs.named_parameters())
    ours = Decoder(config)
    specs = ours.parameter_specs()
    assert {specs[name].theirs: p.shape for name, p in ours.named_parameters()} == {
        n: p.shape for n, p in names.items()
    }
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(names[specs[name].theirs])
    tokens = some_tokens(config)
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    (logits := ours(tokens, positions)).square().mean().backward()
    (reference := theirs(tokens).logits).square().mean().backward()
    assert relative_error(logits.detach(), reference.detach()) <= TOLERANCE
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, names[specs[name].theirs].grad) <= TOLERANCE, name


def test_scaled_frequencies_equal_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = ModelConfig(dim=256, heads=2, rope_theta=500_000.0, rope_scaling=Llama3Scaling())
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=65536)
    reference, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, device=torch.device("cpu"))
    ours = rope_frequencies(config.rope, torch.device("cpu"))
    assert torch.equal(ours, reference)
    assert factor == 1.0
    stretch = rope_frequencies(ModelConfig(dim=256, heads=2, rope_theta=500_000.0).rope, torch.device("cpu")) / ours
    kept, stretched = (stretch < 1.0001), (stretch > 7.999)
    assert kept.any() and stretched.any() and not (kept | stretched).all(), "one of the three ranges is not seen"


def test_rotary_tables_equal_those_of_transformers_at_far_positions():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.tensor([[0, 1, 777, 8191, 131_071]])
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=2))(torch.zeros(1), positions)
    ours = rope_tables(positions, ModelConfig(dim=256, heads=2).rope, torch.float32)
    for table, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(table, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["llama", "qwen3 tied"])
def test_packed_documents_get_the_logits_that_each_gets_alone(tmp_path: Path, case):
    torch.manual_seed(0)
    config = small_config(tmp_path, "batch.seq_len=40")
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    batch = micro_batches(range(4), data.train, 4)[0]
    model = Decoder(CASES[case]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
        packed = model(batch.inputs, batch.positions, batch.documents)
        mixed = model(batch.inputs, batch.positions, None)
    lengths = []
    for row, (tokens, begins) in enumerate(zip(batch.inputs, batch.documents.begins, strict=True)):
        for inside in (slice(*ends) for ends in pairwise((*begins, len(tokens)))):
            alone = our_logits(model, tokens[inside].unsqueeze(0))[0]
            assert relative_error(packed[row, inside], alone) <= 1e-12
            lengths.append(len(alone))
    assert len(lengths) > len(batch.inputs) and len(set(lengths)) > 3, "the documents are too few to show anything"
    assert relative_error(mixed, packed) > 1e-2, "the mask changes nothing"


def test_a_token_sees_none_that_comes_after_it():
    torch.manual_seed(0)
    model = Decoder(CASES["llama"]).double()
    tokens = some_tokens(CASES["llama"])
    changed = tokens.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 61
    before, after = our_logits(model, tokens), our_logits(model, changed)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_presets_have_the_size_of_their_names(name):
    config = config_from_tree(compose_tree([f"model={name}"])).model
    check_model(config)
    assert config.name == name
    total, multiplying = parameter_count(config)
    assert total == KNOWN_PARAMETERS[name]
    assert total - multiplying == (0 if config.tie_embeddings else config.vocab_size * config.dim)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_tensors_of_transformers(name):
    """Built there from the config.json that an export would write, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_from_tree(compose_tree([f"model={name}"])).model
    values = their_config(config, torch.float32, 4096, None)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    ours = {spec.theirs: their_shape(spec) for spec in parameter_specs(config).values()}
    assert ours == {name: p.shape for name, p in theirs.named_parameters()}


def test_the_meta_device_holds_the_model_without_memory():
    config = config_from_tree(compose_tree(["model=llama3_70b"])).model
    with torch.device("meta"):
        model = Decoder(config)
        logits = model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8).unsqueeze(0))
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    assert logits.is_meta and logits.shape == (1, 8, config.vocab_size)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"heads": 7}, "model.dim=30 is not divisible by model.heads=7"),
        ({"kv_heads": 2}, r"possible for kv_heads are \[1, 3\]"),
        ({"head_dim": 5}, "must be even"),
        ({"layers": 0}, "model.layers=0"),
    ],
)
def test_shapes_that_are_no_decoder_are_refused(keys, named):
    with pytest.raises(ValueError, match=named):
        check_model(ModelConfig(**ODD | keys))


def test_an_unknown_kind_of_layer_is_refused():
    with pytest.raises(ValueError, match=r"^model.block=mamba: possible are llama$"):
        check_model(ModelConfig(block="mamba"))
