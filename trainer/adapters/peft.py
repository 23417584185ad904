"""Adapters in PEFT's folders: adapter_config.json and adapter_model.safetensors, read and written.

    ours                              theirs
    blocks.0.attention.wq.lora_a      base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    blocks.0.attention.wq.lora_b      ...lora_B.weight
    blocks.0.attention.wq.magnitude   ...lora_magnitude_vector
    norm.weight, learned beside it    base_model.model.model.norm.weight, and its layer in modules_to_save
    embed.weight, tied and learned    also base_model.model.lm_head.weight, and ensure_weight_tying

Rows of ours are rows of theirs, so that loading reads just those of a shard.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rowwise.kernels.spec import Specs, learning
from rowwise.trainer.adapters.config import AdapterConfig, Dora, Lora
from rowwise.trainer.adapters.specs import adapted_layers, with_adapter
from rowwise.trainer.models.config_json import read_object
from rowwise.trainer.models.huggingface import FLOATS, opened, their_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
THEIRS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
LowRank = Lora | Dora
# What must be so in a folder: another would compute otherwise.
PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "layer_replication": None,
    "trainable_token_indices": None, "exclude_modules": None, "target_parameters": None,
}  # fmt: skip
# What begins as a part that goes out of W.
TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")


def name_in_folder(name: str, specs: Specs) -> str:
    """Gives the name in a folder of a parameter that learns; `specs`: of the plain model."""
    if name in specs:
        return PREFIX + their_name(name, specs[name])
    layer, _, what = name.rpartition(".")
    return f"{PREFIX}{_their_layer(layer, specs)}.{THEIRS[what]}"


def copies_in_folder(names: Iterable[str], specs: Specs) -> dict[str, str]:
    """Finds the tensors of a folder that are one with another in a model where `names` learn: by their names, that of the other. (PEFT
    puts a module of its own in the place of each, so that a head is no more the embedding that learns, unless it is told.)"""
    tied = [(name, copy) for name in names if name in specs for copy in specs[name].copies]
    return {f"{PREFIX}{copy}": name_in_folder(name, specs) for name, copy in tied}


def check_adapter_source(adapter: AdapterConfig, specs: Specs) -> None:
    """Refuses a folder to start from that does not hold this adapter of a model with these specs, each tensor in its shape. Reads
    headers. Raises ValueError."""
    if not isinstance(adapter, LowRank) or adapter.init_from is None:
        return
    folder = Path(adapter.init_from).expanduser()
    with _refusing(folder):
        said = read_object(folder / CONFIG)
        for key, plain in PLAIN.items():
            if (said.get(key) or plain) != plain:
                raise ValueError(f"its {CONFIG} has {key}={said[key]!r}, and possible is {plain!r}")
        ours = {
            "r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.rslora, "use_dora": isinstance(adapter, Dora),
        }  # fmt: skip
        keys = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}
        for key, value in ours.items():
            if said.get(key, False) != value:
                what = f"adapter.{keys[key]}={value}" if key in keys else f"adapter={adapter.name}"
                raise ValueError(f"its {CONFIG} has {key}={said.get(key)!r}, and the run {what}")
        _check_patterns(said, adapter, specs)
        if (began := str(said.get("init_lora_weights"))).startswith(TAKEN_OUT):
            raise ValueError(
                f"its {CONFIG} has init_lora_weights={began!r}, so that it stands beside what is left of the matrices: convert it "
                "first (PEFT's save_pretrained, path_initial_model_for_weight_conversion)"
            )
        _check_tensors(folder, adapter, specs)


def with_ranks_of_folder(adapter: AdapterConfig, specs: Specs) -> AdapterConfig:
    """Returns the adapter with the ranks that its matrices have in the folder to start from, where that says that they are not all
    the same and the run does not say which; a matrix that has none there has none here. Reads headers. Raises ValueError."""
    if not isinstance(adapter, Lora) or adapter.init_from is None or adapter.ranks is not None:
        return adapter
    folder = Path(adapter.init_from).expanduser()
    with _refusing(folder):
        if not (said := read_object(folder / CONFIG)).get("rank_pattern"):
            return adapter
        with opened(folder / WEIGHTS) as file:
            names = {layer: name_in_folder(f"{layer}.lora_a", specs) for layer in adapted_layers(specs, adapter)}
            there = set(file.keys())
            for layer, name in names.items():
                if name not in there and _is_target(said, _their_layer(layer, specs)):
                    raise ValueError(f"it has no tensor {name}, and its {CONFIG} has the layer in target_modules")
            ranks = {f"{layer}.weight": _rows(file, name) if name in there else 0 for layer, name in names.items()}
    return replace(adapter, ranks=ranks)


def _is_target(said: Mapping[str, Any], name: str) -> bool:
    """Whether a layer has the adapter by names alone: a text is a regular expression, and layers may be left out by number."""
    targets = said.get("target_modules")
    return (
        isinstance(targets, list)
        and said.get("layers_to_transform") is None
        and any(f".{name}".endswith(f".{target}") for target in targets)
    )


def _rows(file: Any, name: str) -> int:
    shape = file.get_slice(name).get_shape()
    if len(shape) != 2:
        raise ValueError(f"its {name} is {tuple(shape)}, and possible is a matrix")
    return int(shape[0])


def _check_patterns(said: Mapping[str, Any], adapter: LowRank, specs: Specs) -> None:
    """Refuses a folder in which a layer has another rank, or is multiplied by another number, than in the run. Its patterns are taken
    as the ends of names, or after ^ as whole ones: a stranger's regular expressions are not run."""
    ranks, alphas = (_pattern(said, key) for key in ("rank_pattern", "alpha_pattern"))
    odd = next(
        (f"; {key!r} is read as a name, not as a regular expression" for key in [*ranks, *alphas] if _is_odd(key)), ""
    )
    for layer in adapted_layers(specs, adapter):
        own, name = adapter.at(f"{layer}.weight"), _their_layer(layer, specs)
        rank, alpha = (
            next((value for key, value in pattern.items() if _is_end(key, name)), usual)
            for pattern, usual in ((ranks, adapter.rank), (alphas, adapter.alpha))
        )
        if rank != own.rank or not math.isclose(alpha, own.alpha, rel_tol=1e-6):
            alike = "a layer with a rank of its own (adapter.ranks) is multiplied by as much as all"
            raise ValueError(
                f"its {CONFIG} gives {name} rank {rank} and lora_alpha {alpha}, and the run rank {own.rank} and {own.alpha}: "
                f"{alike if isinstance(adapter, Lora) else f'adapter={adapter.name} gives every layer the same'}{odd}"
            )


def _pattern(said: Mapping[str, Any], key: str) -> Mapping[str, float]:
    pattern = said.get(key) or {}
    if not isinstance(pattern, dict) or not all(isinstance(value, int | float) for value in pattern.values()):
        raise ValueError(f"its {CONFIG} has {key}={pattern!r}, and possible are names of layers with a number each")
    return pattern


def _is_end(key: str, name: str) -> bool:
    return key == f"^{name}" or f".{name}".endswith(f".{key}")


def _is_odd(key: str) -> bool:
    """Whether it stands for other names than the ends that it spells."""
    return re.fullmatch(r"\^?[\w.-]+", key) is None


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Raises what is wrong with a folder to start from as one ValueError."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(
            f"adapter.init_from={folder}: {error}; give a folder that PEFT or `rowwise export adapter_only=true` wrote of an "
            "adapter of this model, or adapter.init_from=null"
        ) from None


def _check_tensors(folder: Path, adapter: LowRank, specs: Specs) -> None:
    learned = learning(with_adapter(specs, adapter))
    shapes = {name_in_folder(name, specs): spec.shape for name, spec in learned.items()}
    copies = copies_in_folder(learned, specs)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"no {WEIGHTS} in it")
    with opened(folder / WEIGHTS) as file:
        there = set(file.keys())
        if missing := sorted(shapes.keys() - there):
            raise ValueError(
                f"it has no tensor {missing[0]} ({len(missing)} of {len(shapes)} are missing): it is an adapter of other layers or "
                "of another model"
            )
        if apart := sorted(copies.keys() - there):
            raise ValueError(
                f"it has {copies[apart[0]]} and no {apart[0]}: that did not learn with it, as the model, which ties them, does "
                "(ensure_weight_tying=True of PEFT)"
            )
        if more := sorted(there - shapes.keys() - copies.keys()):
            raise ValueError(f"it has a tensor {more[0]}, which is in neither adapter.layers nor adapter.train")
        for name, shape in shapes.items():
            rows = file.get_slice(name)
            if (theirs := tuple(rows.get_shape())) != tuple(shape):
                raise ValueError(f"its {name} is {theirs}, and that of the run {tuple(shape)}: it is of another model")
            if rows.get_dtype() not in FLOATS:
                raise ValueError(f"its {name} is of dtype {rows.get_dtype()}, possible are {', '.join(FLOATS)}")
        for copy, name in copies.items():
            if not torch.equal(file.get_tensor(copy), file.get_tensor(name)):
                raise ValueError(f"its {copy} differs from {name}, and the model ties them")


def adapter_rows_from(folder: Path, specs: Specs) -> Callable[[str, Tensor, int, int], None]:
    """Returns a function that fills rows of a parameter that learns from the folder, and reads no others; see
    `parallel.shard.materialize`. The folder must be checked."""
    open_ = cache(opened)

    def fill_(name: str, rows: Tensor, start: int, size: int) -> None:
        source = open_(folder / WEIGHTS).get_slice(name_in_folder(name, specs))
        if rows.numel():
            rows.copy_(source[start : start + rows.size(0)])

    return fill_


def write_adapter(
    folder: Path, adapter: LowRank, specs: Specs, read_: Callable[[dict[str, Tensor]], None], dtype: torch.dtype
) -> int:
    """Writes the folder of an adapter, whose tensors `read_` fills by our names, into an existing folder, and returns how many numbers
    it has. `specs`: of the plain model. Raises ValueError for numbers that `dtype` cannot hold."""
    shapes = {name: spec.shape for name, spec in learning(with_adapter(specs, adapter)).items()}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    read_(tensors)
    if spoilt := next((name for name, t in tensors.items() if not t.isfinite().all()), None):
        raise ValueError(f"{spoilt} has numbers that are infinite or undefined in {dtype}; give a wider dtype")
    named = {name_in_folder(name, specs): t for name, t in tensors.items()}
    named |= {copy: named[name].clone() for copy, name in copies_in_folder(tensors, specs).items()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(their_adapter_config(adapter, specs), indent=2))
    return sum(t.numel() for t in tensors.values())


def their_adapter_config(adapter: LowRank, specs: Specs) -> dict[str, Any]:
    """Gives the adapter_config.json of an adapter."""
    trained = [name for name in learning(with_adapter(specs, adapter)) if name in specs]
    copies = [copy.removeprefix(PREFIX).rpartition(".")[0] for copy in copies_in_folder(trained, specs)]
    plain = dict(PLAIN) | ({"ensure_weight_tying": True} if copies else {})
    return plain | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": isinstance(adapter, Dora),
        "init_lora_weights": True,
        **_patterns(adapter, specs),
        "target_modules": [_their_layer(layer, specs) for layer in adapted_layers(specs, adapter)],
        "modules_to_save": [*(_their_layer(name.rpartition(".")[0], specs) for name in trained), *copies] or None,
    }


def _patterns(adapter: LowRank, specs: Specs) -> dict[str, dict[str, Any]]:
    """What of the layers with a rank of their own the folder says, by their names."""
    layers = adapted_layers(specs, adapter)
    own = {_their_layer(layer, specs): adapter.at(f"{layer}.weight") for layer in layers}
    others = {layer: one for layer, one in own.items() if one.rank != adapter.rank}
    return {
        "rank_pattern": {layer: one.rank for layer, one in others.items()},
        "alpha_pattern": {layer: one.alpha for layer, one in others.items()},
    }


def _their_layer(layer: str, specs: Specs) -> str:
    weight = f"{layer}.weight"
    if specs[weight].their_rows is not None:
        raise ValueError(
            f"{weight} is some rows of a tensor of its family's folders, beside which PEFT has one adapter and the run several; "
            "possible is the merged export"
        )
    return their_name(weight, specs[weight]).removesuffix(".weight")
