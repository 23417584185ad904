"""The fields that every optimizer configuration has."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Assign:
    """Parameters whose names match the shell pattern `match` follow `rule`: `own`, that of `optim.name`, or another by
    name, with the same learning rate, betas and eps."""

    match: str
    rule: Literal["own", "adamw", "adamw8bit", "lion", "lion8bit"]


@dataclass(frozen=True, kw_only=True)
class OptimBase:
    """`weight_decay` acts on matrices and not on vectors. `assign`: the first pattern that matches wins, before the
    rule's own table. `param_dtype=bf16` keeps no float32 parameters and rounds stochastically. `in_backward` steps each
    parameter as soon as its gradient is complete, and frees the gradient."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    param_dtype: Literal["bf16"] | None = None
    in_backward: bool = False
    assign: list[Assign] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class AdamBase(OptimBase):
    """What every rule with Adam's two moments has; rules without fall back on it for other parameters."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
