"""An adapter as LoRA that stands beside all of W, which is what PEFT's folders hold.

    pissa, corda    R + s B A  =  W + s (B A - B0 A0)  =  W + s [B  -B0] [A; A0]        R = W - s B0 A0 is what the run keeps
    adalora         s B diag(E) A  =  (alpha / r) (B diag(E) s r / alpha) A

The first is PEFT's own conversion, of twice the rank. A0 and B0 are not kept: they are halves of (W - R) / s, which has their rank.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from rowwise.kernels.spec import Specs
from rowwise.trainer.adapters.config import OUT_OF_W, AdaLora, Dora, Lora
from rowwise.trainer.adapters.initial import Fill
from rowwise.trainer.adapters.merge import Read

REMAINS = 1e-4  # of W, at most, beyond the rank of what was taken out: the roundings of 32 bits


def as_lora(adapter: Lora | Dora | AdaLora, specs: Specs, read_: Read, began_: Fill) -> tuple[Lora | Dora, Read]:
    """Returns the adapter as LoRA or DoRA, and what fills its tensors; see `doubled`."""
    if isinstance(adapter, AdaLora):
        plain = Lora(rank=adapter.rank, alpha=adapter.alpha, layers=adapter.layers, train=adapter.train)
        return plain, _with_numbers(adapter, read_)
    if isinstance(adapter, Lora) and adapter.init in OUT_OF_W:
        return doubled(adapter, specs, read_, began_)
    return adapter, read_


def _with_numbers(adapter: AdaLora, read_: Read) -> Read:
    """What fills B with B diag(E), and all else as it is."""

    def fill_(tensors: dict[str, Tensor]) -> None:
        read_(tensors)
        for name, b in tensors.items():
            if name.endswith(".lora_b"):
                e = torch.empty(adapter.rank, 1)
                read_({f"{name.removesuffix('lora_b')}lora_e": e})
                b *= e.flatten() * (adapter.scale * adapter.rank / adapter.alpha)

    return fill_


def doubled(adapter: Lora, specs: Specs, read_: Read, began_: Fill) -> tuple[Lora, Read]:
    """Returns the adapter of twice the rank, and what fills its tensors. `specs`: of the plain model; `read_` fills those of the run;
    `began_` the matrices that it began with. That raises ValueError where these are others, or kept in fewer bits."""
    alpha = adapter.alpha * (math.sqrt(2) if adapter.rslora else 2)
    wider = replace(adapter, rank=2 * adapter.rank, alpha=alpha, init="kaiming")

    def fill_(tensors: dict[str, Tensor]) -> None:
        layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith((".lora_a", ".lora_b")))
        if others := {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in layers}:
            read_(others)
        for layer in layers:
            shape = specs[f"{layer}.weight"].shape
            held = {f"{layer}.{key}": torch.empty(spec.shape) for key, spec in adapter.added(shape).items()}
            read_(held)
            a0, b0 = taken_out(adapter, f"{layer}.weight", shape, read_, began_)
            tensors[f"{layer}.lora_a"].copy_(torch.cat([held[f"{layer}.lora_a"], a0]))
            tensors[f"{layer}.lora_b"].copy_(torch.cat([held[f"{layer}.lora_b"], -b0], dim=1))

    return wider, fill_


def taken_out(adapter: Lora, name: str, shape: torch.Size, read_: Read, began_: Fill) -> tuple[Tensor, Tensor]:
    """Returns A0 and B0 of the matrix `name`. Raises ValueError where it is not what the run began with without them."""
    rest, w = torch.empty(shape), torch.empty(shape)
    try:
        read_({name: rest})
        began_(name, w, 0, shape[0])
    except (OSError, ValueError) as error:
        raise ValueError(_told(name, str(error))) from None
    u, s, vt = torch.linalg.svd((w - rest) / adapter.scale, full_matrices=False)
    if s[adapter.rank :].norm() * adapter.scale > REMAINS * w.norm():
        raise ValueError(_told(name, "it is kept in fewer bits, or is not from model.init_from, or seed"))
    root = s[: adapter.rank].sqrt()
    return root[:, None] * vt[: adapter.rank], u[:, : adapter.rank] * root


def _told(name: str, why: str) -> str:
    return f"what the run took out of {name} when it began cannot be found: {why}; possible is the merged export"
