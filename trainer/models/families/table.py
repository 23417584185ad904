"""The families of models in folders of Hugging Face, as a table: of each, how the keys of its config.json say the model.* keys, and
what its tensors are called. Needs no torch.

A key of a config.json says one model.* key or several (`Key`); a family has some of them, and what every model of it has (`fixed`). A
config.json is read by the table of its `model_type`, and a model is written as the first family whose config.json, read back, says
the same model. Sources: the modelling files of transformers, and the papers of the families.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import Any, NamedTuple

from rowwise.trainer.models.families.rope import ROPES, Keys


def _same(value: Any) -> Any:
    return value


class Key(NamedTuple):
    """A key of a config.json: the model.* keys that it says, all alike; `default`: what it is where the file does not say, REQUIRED
    for a file that must; `read` and `write`: its value from theirs to ours and back."""

    theirs: str
    ours: tuple[str, ...]
    default: Any
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


REQUIRED = object()
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _our_activation(theirs: Any) -> str:
    if theirs not in ACTIVATIONS:
        raise ValueError(f"the activation is {theirs!r}, possible are {' and '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def _inverse(value: float) -> float:
    """Of whole numbers the whole one."""
    inverse = 1 / value
    return round(inverse) if isclose(inverse, round(inverse), rel_tol=1e-12) else inverse


def _activation(theirs: str, default: str) -> Key:
    back = {ours: one for one, ours in ACTIVATIONS.items()}
    return Key(theirs, ("activation",), default, _our_activation, back.__getitem__)


COMMON = (
    Key("num_hidden_layers", ("layers",), REQUIRED),
    Key("hidden_size", ("dim",), REQUIRED),
    Key("num_attention_heads", ("heads",), REQUIRED),
    Key("intermediate_size", ("ffn_dim",), REQUIRED),
    Key("vocab_size", ("vocab_size",), REQUIRED),
)
ACTIVATION = _activation("hidden_act", "silu")
ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "out_bias"), False)
MLP_BIAS = Key("mlp_bias", ("mlp_bias",), False)
SCALAR = Key(
    "query_pre_attn_scalar", ("attention_scale",), 256, lambda theirs: theirs**-0.5, lambda ours: round(ours**-2)
)
CAPS = (
    Key("attn_logit_softcapping", ("attention_cap",), None),
    Key("final_logit_softcapping", ("logit_cap",), None),
)
MULTIPLIERS = (
    Key("embedding_multiplier", ("embed_scale",), 1.0),
    Key("residual_multiplier", ("residual_scale",), 1.0),
    Key("attention_multiplier", ("attention_scale",), 1.0),
    Key("logits_scaling", ("logit_scale",), 1.0, _inverse, _inverse),
)


@dataclass(frozen=True)
class Windows:
    """How a family says which layers have a window. `default`: of `sliding_window`; `switch`: `use_sliding_window` turns it on;
    `layers`: of a config.json without `layer_types`, whether layer n has it (None: all have)."""

    default: int | None = None
    switch: bool = False
    layers: Callable[[Keys, int], bool] | None = None


@dataclass(frozen=True)
class Family:
    """A family. `keys`: those beside COMMON; `fixed`: our keys that all its models have, some a function of the others; `theirs`: what
    else in its config.json must be one of these values, where it is there; `tie`: whether embeddings are tied where it does not say;
    `eps` of norms, `head_dim` (None: dim / heads), `theta` and `local_theta`: likewise; `ropes`: how rotary positions are stretched;
    `rope_share`: parts of heads may turn; `rope_layers`: whether layer n turns them (None: all do); `sizes`: what its class
    in transformers has where the file does not say; `names`: of our parameters of a
    layer, where they are not Llama's; `fused`: a tensor of theirs, and the parameters of ours that are its rows, in their order."""

    architecture: str
    keys: tuple[Key, ...] = (ACTIVATION,)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    tie: bool = False
    eps: float = 1e-6
    head_dim: int | None = None
    windows: Windows | None = None
    theta: float = 10_000.0
    local_theta: float | None = None
    ropes: tuple[str, ...] = ROPES
    rope_share: bool = False
    rope_layers: Callable[[Keys, int], bool] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# What every key is in models that are Llama's in all that families differ in.
PLAIN: Keys = {
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "qk_norm": False, "qk_norm_over": "head", "norms": "before",
    "norm_offset": 0.0, "embed_scale": 1.0, "residual_scale": 1.0, "attention_scale": None, "attention_cap": None,
    "logit_scale": 1.0, "logit_cap": None, "rope_layers": [True], "stable_embedding": False,
}  # fmt: skip
AFTER = {
    "attention_post_norm.weight": "post_attention_layernorm.weight",
    "feed_forward_post_norm.weight": "post_feedforward_layernorm.weight",
}
GEMMA = {
    "norms": "both",
    "norm_offset": 1.0,
    "embed_scale": lambda keys: keys["dim"] ** 0.5,
}


def _turns(theirs: Keys, layer: int) -> bool:
    """Whether a layer of SmolLM3 turns queries and keys: its `no_rope_layers` are 1 for those that do."""
    said = theirs.get("no_rope_layers")
    return bool(said[layer]) if said else (layer + 1) % theirs.get("no_rope_layer_interval", 4) != 0


def _last_layers(theirs: Keys, layer: int) -> bool:
    """Whether a layer of Qwen has the window."""
    return layer >= theirs.get("max_window_layers", 28)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", (ACTIVATION, ATTENTION_BIAS, MLP_BIAS)),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (ACTIVATION, ATTENTION_BIAS),
        {"qk_norm": True},
        windows=Windows(4096, True, _last_layers),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        windows=Windows(4096, True, _last_layers),
    ),
    "mistral": Family("MistralForCausalLM", windows=Windows(4096)),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        (ACTIVATION, ATTENTION_BIAS),
        {"norms": "after", "qk_norm": True, "qk_norm_over": "all"},
        eps=1e-5,
        names=AFTER,
    ),
    "granite": Family("GraniteForCausalLM", (ACTIVATION, ATTENTION_BIAS, MLP_BIAS, *MULTIPLIERS)),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        (ACTIVATION, ATTENTION_BIAS, MLP_BIAS),
        tie=True,
        windows=Windows(None, True, lambda theirs, layer: not _turns(theirs, layer)),
        rope_layers=_turns,
        theta=2_000_000.0,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        eps=1e-5,
        windows=Windows(),
        ropes=("longrope",),
        rope_share=True,
        fused={
            "self_attn.qkv_proj.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
            "mlp.gate_up_proj.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        (_activation("hidden_activation", "gelu_pytorch_tanh"), ATTENTION_BIAS, SCALAR,
         CAPS[0]._replace(default=50.0), CAPS[1]._replace(default=30.0)),
        GEMMA,
        {"use_bidirectional_attention": (None, False)},
        tie=True,
        head_dim=256,
        windows=Windows(4096, False, lambda theirs, layer: layer % 2 == 0),
        names=AFTER | {"feed_forward_norm.weight": "pre_feedforward_layernorm.weight"},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        (_activation("hidden_activation", "gelu_pytorch_tanh"), ATTENTION_BIAS, SCALAR, CAPS[1]),
        GEMMA | {"qk_norm": True},
        {"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
        tie=True,
        head_dim=256,
        windows=Windows(4096, False, lambda theirs, layer: (layer + 1) % theirs.get("sliding_window_pattern", 6) != 0),
        theta=1_000_000.0,
        local_theta=10_000.0,
        sizes={
            "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4,
        },
        names=AFTER | {"feed_forward_norm.weight": "pre_feedforward_layernorm.weight"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """A model of more than text that has a model of `family` in it: its config.json under the key `config`, its tensors under names
    that begin otherwise, by what they begin with in a folder of the family; tensors that begin with one of `beside` are not its."""

    family: str
    config: str
    stems: Mapping[str, str]
    beside: tuple[str, ...]


WHOLES = {
    "gemma3": Whole(
        "gemma3_text",
        "text_config",
        {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."},
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    )
}


def name_in_family(kind: str, name: str) -> str | None:
    """Gives the name that a tensor of a folder has in one of its family alone; None: it is none of the family's."""
    if (whole := WHOLES.get(kind)) is None:
        return name
    if name.startswith(whole.beside):
        return None
    return next((ours + name.removeprefix(stem) for stem, ours in whole.stems.items() if name.startswith(stem)), name)
