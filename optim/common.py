"""The fields that every optimizer configuration has."""

from dataclasses import dataclass, field
from typing import Literal

from rowwise.conf.option import Ask, Fixed, MayChange


@dataclass(frozen=True)
class Assign:
    """Parameters whose names match the shell pattern `match` follow `rule`: `own` is what they would follow without any
    pattern; `frozen` ones do not learn; another rule has the same learning rate, and the same betas and eps where `optim.name`
    has them."""

    match: str
    rule: Literal["own", "frozen", "adamw", "adamw8bit", "lion", "lion8bit"]


@dataclass(frozen=True, kw_only=True)
class OptimBase:
    """`lr`: the peak learning rate; null: it follows from the model's size (`optim.rates`), for rules that have a share
    there. `weight_decay`: acts on matrices and not on vectors. `param_dtype`: `bf16` keeps no float32 parameters and rounds
    stochastically (with `precision=bf16`). `in_backward`: each parameter changes as soon as its gradient is complete, and
    the gradient is freed (without clipping and accumulation). `assign`: other rules for parameters by pattern, [{match:
    "embed.*", rule: adamw8bit}]; the first that matches wins, before the rule's own table."""

    lr: MayChange[float] = 1e-3
    weight_decay: MayChange[float] = 0.1
    param_dtype: Ask[Literal["bf16"] | None] = None
    in_backward: MayChange[bool] = False
    assign: Fixed[list[Assign]] = field(default_factory=list)

    def check(self) -> None:
        """Refuses numbers that the rule cannot use. Raises ValueError."""
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr}: a learning rate is above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay={self.weight_decay}: it is at least 0")


@dataclass(frozen=True, kw_only=True)
class AdamBase(OptimBase):
    """What every rule with Adam's two moments has; rules without fall back on it for other parameters. `betas`: how much of
    the first and of the second moment a step keeps. `eps`: stands beside the root of the second."""

    betas: MayChange[list[float]] = field(default_factory=lambda: [0.9, 0.95])
    eps: MayChange[float] = 1e-8

    def check(self) -> None:
        super().check()
        check_betas(self.betas)
        if self.eps <= 0:
            raise ValueError(f"optim.eps={self.eps}: it is above 0")


def check_betas(betas: list[float]) -> None:
    """Refuses what are not two forgetting factors. Raises ValueError."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optim.betas={list(betas)}: two numbers, each from 0 to below 1")
