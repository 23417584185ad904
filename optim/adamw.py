"""AdamW (Loshchilov & Hutter, *Decoupled Weight Decay Regularization*): elementwise, so every shard is on its own.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    x = x - lr wd x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

State bytes per parameter: 4 + 4 in fp32. Nothing crosses ranks.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rowwise.conf.option import Fixed
from rowwise.kernels.adamw import adamw_
from rowwise.optim.common import AdamBase
from rowwise.optim.rule import Batch, Rule, pick, zeros_of


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(AdamBase):
    name: Fixed[Literal["adamw"]] = "adamw"

    def new_rule(self) -> Rule:
        return AdamW(self.betas, self.eps)


class AdamW:
    """The shell around `adamw_`. State: `exp_avg`, `exp_avg_sq`, split like the parameter."""

    name = "adamw"
    fused = True
    rounds = False
    rounds_on_host = True
    by_rows = True
    shared = False
    weightwise: ClassVar[dict[str, int]] = {"exp_avg": 0, "exp_avg_sq": 0}

    def __init__(self, betas: list[float], eps: float):
        (self.beta1, self.beta2), self.eps = betas, eps

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {key: zeros_of(p, state_dtype(p)) for key in ("exp_avg", "exp_avg_sq")}

    def step_(self, batch: Batch) -> None:
        first, second = pick(batch, "exp_avg"), pick(batch, "exp_avg_sq")
        rates = (batch.step, batch.lr, self.beta1, self.beta2, self.eps, batch.weight_decay)
        adamw_(batch.params, batch.grads, first, second, *rates, batch.rounding_if_narrow())


def state_dtype(p: Tensor) -> torch.dtype:
    """Returns the dtype of states in full: float32, or float64 where the parameters are."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
