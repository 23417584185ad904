"""Mixed precision (Micikevicius et al.): which dtype computes, which is kept, which is reduced; and the loss scale.

| name | parameters and states | computes in | gradients reduced in | loss scale |
|---|---|---|---|---|
| fp64 | fp64 | fp64 | fp64 | - |
| fp32 | fp32 | fp32, products on a GPU in TF32 | fp32 | - |
| bf16 | fp32 (parameters bf16 with `optim.param_dtype=bf16`) | bf16 | fp32 (or bf16) | - |
| fp16 | fp32 | fp16 | fp32 | dynamic |
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fp64:
    name: MayChange[Literal["fp64"]] = "fp64"


@dataclass(frozen=True)
class Fp32:
    """`tf32`: a GPU multiplies by its tensor cores, which round the operands to 11 bits; false: in full, several times
    slower."""

    name: MayChange[Literal["fp32"]] = "fp32"
    tf32: MayChange[bool] = True


@dataclass(frozen=True)
class Bf16:
    """`reduce`: the dtype in which gradients are summed over ranks."""

    name: MayChange[Literal["bf16"]] = "bf16"
    reduce: MayChange[Literal["fp32", "bf16"]] = "fp32"


@dataclass(frozen=True)
class Fp16:
    """`initial_scale`: the loss scale at the start; it halves at an overflow. `growth_every`: good steps after which it
    doubles."""

    name: MayChange[Literal["fp16"]] = "fp16"
    initial_scale: MayChange[float] = 65536.0
    growth_every: MayChange[int] = 2000


PrecisionConfig = Fp64 | Fp32 | Bf16 | Fp16

LOSS_SCALE: Refusals = (
    Refusal(
        ("precision.initial_scale", "precision.growth_every"),
        lambda run: (
            isinstance(run.precision, Fp16)
            and not (1 <= run.precision.initial_scale < math.inf and run.precision.growth_every >= 1)
        ),
        "precision=fp16: precision.initial_scale (finite) and precision.growth_every are at least 1",
    ),
)
BF16_PARAMETERS: Refusals = (
    Refusal(
        ("optim.param_dtype", "precision.name"),
        lambda run: run.optim.param_dtype is not None and run.precision.name != "bf16",
        "optim.param_dtype=bf16 with precision={precision.name}: parameters kept in bf16 compute in bf16; "
        "give precision=bf16, or leave optim.param_dtype=null",
    ),
    # A pipeline adds up whole gradients in 32 bits and splits them once.
    Refusal(
        ("optim.param_dtype", "parallel.zero", "batch.global_size", "batch.micro_size"),
        lambda run: (
            run.optim.param_dtype is not None
            and run.parallel.zero >= 2
            and run.micro_batches > 1
            and run.parallel.pipeline == 1
        ),
        lambda run: (
            f"optim.param_dtype=bf16 with parallel.zero={run.parallel.zero} and {run.micro_batches} micro-batches a "
            "step: split gradients would be added up in bf16; give parallel.zero=1, or "
            f"batch.micro_size={run.batch.micro_size * run.micro_batches}"
        ),
    ),
)


def master_dtype(config: PrecisionConfig) -> torch.dtype:
    """Returns the dtype in which parameters and optimizer states are kept."""
    return torch.float64 if isinstance(config, Fp64) else torch.float32


def compute_dtype(config: PrecisionConfig) -> torch.dtype:
    """Returns the dtype in which layers compute, and activations cross stages."""
    return DTYPES[config.name] if isinstance(config, Bf16 | Fp16) else master_dtype(config)


def product_precision(config: PrecisionConfig, device: torch.device) -> Literal["highest", "high"]:
    """Says how a model's float32 products are computed on `device`: see `kernels.products.float32_products`."""
    return "high" if isinstance(config, Fp32) and config.tf32 and device.type == "cuda" else "highest"


@dataclass(frozen=True)
class LossScale:
    """The factor on the loss, the good steps since it last changed, and the steps skipped in all."""

    scale: float = 1.0
    good_steps: int = 0
    skipped: int = 0


def initial_loss_scale(config: PrecisionConfig) -> LossScale:
    """Returns the loss scale at the start: fp16's own, and 1 of every other precision."""
    return LossScale(config.initial_scale) if isinstance(config, Fp16) else LossScale()


def next_loss_scale(now: LossScale, config: PrecisionConfig, overflow: bool) -> LossScale:
    """Returns the scale of the next step: halved at an overflow (never below 1), doubled after `growth_every` good steps."""
    if not isinstance(config, Fp16):
        return now
    if overflow:
        return LossScale(max(1.0, now.scale / 2), 0, now.skipped + 1)
    if now.good_steps + 1 >= config.growth_every:
        return LossScale(now.scale * 2, 0, now.skipped)
    return replace(now, good_steps=now.good_steps + 1)
