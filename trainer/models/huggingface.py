"""To and from Hugging Face folders of Llama and Qwen3: config.json and safetensors in one or many files.

The two forms differ in names only (the rotary halves stand in the same order), so a row of ours is a row of theirs:
loading reads just the rows of a shard, exporting holds one output file at a time.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rowwise.trainer.models.decoder import ModelConfig
from torch import Tensor

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_OUTER_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INDEX = "model.safetensors.index.json"


def their_name(name: str) -> str:
    """The Hugging Face name of one of our parameters."""
    stem = name.removesuffix(".weight")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return f"{_OUTER_NAMES[stem]}.weight"


def their_config(config: ModelConfig, dtype: torch.dtype, max_positions: int) -> dict[str, Any]:
    """The config.json of a model."""
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
        "eos_token_id": None,
    }


def check_source(folder: Path, config: ModelConfig) -> None:
    """Refuses a folder that is no Hugging Face model or not the one `config` describes. Raises ValueError."""
    try:
        theirs = json.loads((folder / "config.json").read_text())
        _weight_files(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model.init_from={folder}: not a Hugging Face folder ({error}); give one with config.json and safetensors"
        ) from None
    if theirs.get("model_type") not in ("llama", "qwen3"):
        raise ValueError(
            f"model.init_from={folder}: model_type is {theirs.get('model_type')!r}; possible are llama and qwen3"
        )
    ours, theirs = _comparable(their_config(config, torch.float32, 0)), _comparable(theirs)
    different = [f"{key}={theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if different:
        raise ValueError(
            f"model.init_from={folder} is another model: {', '.join(different)}; give the model.* keys that fit it"
        )


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that must agree, with what may be left out filled in; transformers 5 keeps RoPE in a place of its own."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    heads = config["num_attention_heads"]
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    kind = rope.get("rope_type", rope.get("type", "default"))
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {key: config[key] for key in keys} | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        "rope": kind if kind == "default" else (kind, *(float(rope.get(number, 0)) for number in numbers)),
    }


def rows_from(folder: Path) -> Callable[[str, Tensor, int, int], None]:
    """A function that fills rows of a parameter from the folder's safetensors; see `parallel.shard.materialize`."""
    files = _weight_files(folder)

    @cache
    def opened(path: Path):
        from safetensors import safe_open

        return safe_open(path, framework="pt")

    def fill_(name: str, rows: Tensor, start: int, size: int) -> None:
        theirs = their_name(name)
        if theirs not in files:
            raise RuntimeError(f"{folder} has no tensor {theirs}, which the model needs")
        source = opened(files[theirs]).get_slice(theirs)
        shape = [size, *rows.shape[1:]]
        if list(source.get_shape()) != shape:
            raise RuntimeError(
                f"{files[theirs]}: {theirs} has the shape {source.get_shape()}, and the model needs {shape}"
            )
        if rows.numel():
            rows.copy_(source[start : start + rows.size(0)])

    return fill_


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    if (folder / INDEX).is_file():
        return {name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    from safetensors import safe_open

    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no {INDEX} and no {path.name} in it")
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def write_folder(
    folder: Path,
    config: ModelConfig,
    shapes: dict[str, torch.Size],
    read: Callable[[list[str]], dict[str, Tensor]],
    dtype: torch.dtype,
    max_positions: int,
    max_file_bytes: int,
) -> list[Path]:
    """Writes config.json and the safetensors files, one at a time; `read(names)` fetches the parameters of a file.

    `shapes` are those of our parameters. Returns the safetensors files.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = list(_pack(shapes, dtype.itemsize, max_file_bytes))
    written, weight_map = [], {}
    for number, names in enumerate(files, 1):
        single = len(files) == 1
        path = folder / ("model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors")
        tensors = {their_name(name): tensor.to(dtype).contiguous() for name, tensor in read(names).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        written.append(path)
    if len(files) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    (folder / "config.json").write_text(json.dumps(their_config(config, dtype, max_positions), indent=1))
    return written


def _pack(shapes: dict[str, torch.Size], itemsize: int, max_bytes: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `max_bytes` (a larger tensor is a group of its own)."""
    group: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = shape.numel() * itemsize
        if group and held + size > max_bytes:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
