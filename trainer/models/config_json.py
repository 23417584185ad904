"""A Hugging Face config.json and the model.* keys that it describes. Needs no torch: what is wrong with a folder to start
from is said without waiting for it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rowwise.trainer.files import from_json

if TYPE_CHECKING:
    import torch

    from rowwise.trainer.models.config import ModelConfig

FORMS = ("dense", "condensed", "semi_structured")  # of hidden weights: see `trainer.models.forms`
FORM, _TYPE = "rowwise_form", "rowwise_"
# What our decoder has in one form only: the values in a config.json that say so, the default where it says nothing.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def their_config(
    config: "ModelConfig", dtype: "torch.dtype", max_positions: int, end_token: int | None
) -> dict[str, Any]:
    """Returns the config.json of a model, in the form that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": max_positions,
        "dtype": str(dtype).removeprefix("torch."),
        # Text of Rowwise has no token that begins it; transformers would otherwise assume Llama's.
        "bos_token_id": None,
        "eos_token_id": end_token,
    }


def with_form(config_json: dict[str, Any], form: str) -> dict[str, Any]:
    """Returns the config.json of a model whose hidden weights are in one of FORMS. transformers refuses the model type of all but
    `dense`: it would replace tensors that it does not find by random ones."""
    if form == "dense":
        return config_json
    return config_json | {"model_type": _TYPE + config_json["model_type"], "architectures": [], FORM: form}


def without_form(config_json: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns what `with_form` made a config.json of, and the form."""
    form = config_json.get(FORM, "dense")
    return config_json | {"model_type": config_json["model_type"].removeprefix(_TYPE)}, form


def our_keys(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the model.* keys that a config.json describes, as plain values. Raises ValueError for what our decoder does not
    have."""
    kind = theirs.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"model_type is {kind!r}, possible are llama and qwen3")
    for key, value in _FIXED.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{key} is {theirs[key]!r}, possible is {value!r}")
    # transformers 5 writes rope_parameters, and goes by rope_scaling where an older folder has it.
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    heads = theirs["num_attention_heads"]
    return {
        "layers": theirs["num_hidden_layers"],
        "dim": theirs["hidden_size"],
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
        "ffn_dim": theirs["intermediate_size"],
        "vocab_size": theirs["vocab_size"],
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "stable_embedding": False,
        "qk_norm": kind == "qwen3",
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)),
        "rope_scaling": _our_scaling(rope),
    }


def _our_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"the RoPE is {rope}, possible are the rope_type default and llama3, of whole heads")
    if kind == "default":
        return None
    keys = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return keys | {"original_length": rope["original_max_position_embeddings"]}


def read_shape(folder: Path) -> dict[str, Any]:
    """Reads the model.* keys that the config.json of a folder describes; `head_dim` only where it is not dim / heads. Raises
    ValueError."""
    with refusing(folder):
        keys = our_keys(read_config(folder))
        implied = keys["head_dim"] == keys["dim"] // keys["heads"]
        return keys | ({"head_dim": None} if implied else {})


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder. Raises OSError and ValueError."""
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises OSError and ValueError."""
    tree = from_json(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return tree


def refuse_other_shape(folder: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Refuses another shape: raises ValueError where a model.* key is not the same in the folder and in what was given: pairs of
    both."""
    different = [f"model.{key}={there} there and {here} here" for key, (there, here) in pairs.items() if there != here]
    with refusing(folder):
        if different:
            raise ValueError(f"it is another model, {', '.join(different)}")


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Raises what is wrong with a folder to start from as one ValueError."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"model.init_from={folder}: its JSON has no key {error}; complete the folder") from None
    except (OSError, ValueError, SafetensorError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"model.init_from={folder}: {error}; give a Hugging Face folder (config.json and safetensors) of this "
            "model, or leave out model= and the model.* keys that the folder says itself"
        ) from None
