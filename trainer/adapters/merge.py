"""The one matrix that a layer with an adapter stands for: what a run that has ended computes with, in a plain model.

LoRA       W + s B A
AdaLoRA    W + s B diag(E) A
DoRA       as LoRA, its rows at the sizes that were learned
Bone       W + [P^T P^T ...]
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from rowwise.kernels.spec import Specs
from rowwise.kernels.wide import wide_dtype
from rowwise.trainer.adapters.bone import unfolded
from rowwise.trainer.adapters.config import MAGNITUDE, AdapterConfig, Bone, LowRankBase, NoAdapter
from rowwise.trainer.adapters.specs import is_adapted

_ADAPTERS: TypeAdapter[AdapterConfig] = TypeAdapter(AdapterConfig)
Read = Callable[[dict[str, Tensor]], None]  # fills tensors, by our names


def adapter_of(tree: Mapping[str, Any]) -> AdapterConfig:
    """Returns the adapter of a run of this release or an earlier one, by its plain configuration. Raises ValueError."""
    return _ADAPTERS.validate_python(tree["adapter"]) if "adapter" in tree else NoAdapter()


def merged(adapter: AdapterConfig, specs: Specs, dtype: torch.dtype, read_: Read) -> Read:
    """Returns what fills the parameters of a plain model, by name, with those that a run with an adapter computed with. `specs`: of
    the plain model; `dtype`: in which the run kept its parameters; `read_`: fills those of the run."""

    def fill_(tensors: dict[str, Tensor]) -> None:
        read_(tensors)
        for name, tensor in tensors.items():
            if is_adapted(name, specs[name], adapter):
                tensor.copy_(merged_matrix(adapter, name, specs[name].shape, dtype, read_))

    return fill_


def merged_matrix(adapter: AdapterConfig, name: str, shape: torch.Size, dtype: torch.dtype, read_: Read) -> Tensor:
    """Returns the matrix that the layer of the weight `name` stands for, in 32 bits or more."""
    assert isinstance(adapter, LowRankBase | Bone)
    adapter, layer = adapter.at(name), name.removesuffix(".weight")
    parts = {"weight": shape} | {key: spec.shape for key, spec in adapter.added(shape).items()}
    held = {key: torch.empty(size, dtype=wide_dtype(dtype)) for key, size in parts.items()}
    read_({f"{layer}.{key}": t for key, t in held.items()})
    if isinstance(adapter, Bone):
        return held["weight"].add_(unfolded(held["bone"], shape[1]))
    if "lora_e" in held:
        held["lora_a"] *= held["lora_e"]
    whole = held["weight"].addmm_(held["lora_b"], held["lora_a"], alpha=adapter.scale)
    if MAGNITUDE in held:
        whole *= (held[MAGNITUDE] / torch.linalg.vector_norm(whole, dim=1))[:, None]
    return whole
