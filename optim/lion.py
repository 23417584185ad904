"""Lion (Chen et al., *Symbolic Discovery of Optimization Algorithms*; its theory: Chen et al., *Lion Secretly Solves
Constrained Optimization*): elementwise, so every shard is on its own.

    x = x - lr (sign(b1 m + (1 - b1) g) + wd x)          m = b2 m + (1 - b2) g

The iterates enter and stay in the box |x| <= 1 / wd. State bytes per parameter: 4 in fp32. Nothing crosses ranks.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from rowwise.conf.option import Fixed, MayChange
from rowwise.kernels.dispatch import use_numba
from rowwise.kernels.lion import lion_
from rowwise.optim.adamw import state_dtype
from rowwise.optim.common import OptimBase, check_betas
from rowwise.optim.lion_kappa import Kappa
from rowwise.optim.rule import Batch, Rule, pick, row_slices, zeros_of


@dataclass(frozen=True, kw_only=True)
class LionConfig(OptimBase):
    """`betas`: of the sign's mixture and of the momentum. `kappa`: the norm whose gradient hidden matrices follow
    (`optim.lion_kappa`), l1 for Lion itself. `delta`: of huber, the size from which on a number counts only by its sign."""

    name: Fixed[Literal["lion"]] = "lion"
    lr: MayChange[float] = 1e-3
    weight_decay: MayChange[float] = 0.3
    betas: MayChange[list[float]] = field(default_factory=lambda: [0.9, 0.99])
    kappa: MayChange[Kappa] = "l1"
    delta: MayChange[float | None] = None

    def check(self) -> None:
        super().check()
        check_betas(self.betas)
        if (self.delta is not None) != (self.kappa == "huber"):
            raise ValueError(
                f"optim.delta={self.delta} with optim.kappa={self.kappa}: it belongs to huber, which needs it (1e-3, say); "
                "leave it null with any other"
            )
        if self.delta is not None and self.delta <= 0:
            raise ValueError(f"optim.delta={self.delta}: it is above 0")

    def new_rule(self) -> Rule:
        return Lion(self.betas)


class Lion:
    """The shell around `lion_`. State: `exp_avg`, split like the parameter."""

    name = "lion"
    fused = False
    rounds = False
    rounds_on_host = True
    by_rows = True
    shared = False
    weightwise: ClassVar[dict[str, int]] = {"exp_avg": 0}

    def __init__(self, betas: list[float]):
        self.beta1, self._beta2 = betas

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": zeros_of(p, state_dtype(p))}

    def step_(self, batch: Batch) -> None:
        rates = batch.lr, self.beta1, self._beta2, batch.weight_decay
        if use_numba(batch.params):
            lion_(batch.params, batch.grads, pick(batch, "exp_avg"), *rates, batch.rounding_if_narrow())
            return
        for x, g, m in zip(batch.params, batch.grads, pick(batch, "exp_avg"), strict=True):
            for rows in row_slices(x):
                lion_([x[rows]], [g[rows]], [m[rows]], *rates)
