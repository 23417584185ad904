"""AdamW (Loshchilov & Hutter, *Decoupled Weight Decay Regularization*): elementwise, so every shard is on its own.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    x = x - lr wd x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

State bytes per parameter: 4 + 4 in fp32. Nothing crosses ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class AdamWConfig:
    """`weight_decay` acts on matrices (two or more dims) and not on norms."""

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step on lists of local tensors, in place, as torch's fused operator: one pass over memory.

    `step` counts from 1.
    """
    if not params:
        return
    steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


class AdamW(torch.optim.Optimizer):
    """The shell around `adamw_`. State per parameter: `exp_avg`, `exp_avg_sq`, split over ranks like the parameter.

    The number of steps taken is a plain number of each group (`step`), the same for all parameters.
    """

    def __init__(self, groups: list[dict], config: AdamWConfig):
        super().__init__(groups, {"lr": config.lr, "step": 0, "weight_decay": config.weight_decay})
        self.config = config
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure=None):
        """Applies the rule to every parameter that has a gradient."""
        assert closure is None
        beta1, beta2 = self.config.betas
        for group in self.param_groups:
            group["step"] += 1
            live = [p for p in group["params"] if p.grad is not None]
            adamw_(
                [_local(p) for p in live],
                [_local(p.grad) for p in live],
                [_local(self.state[p]["exp_avg"]) for p in live],
                [_local(self.state[p]["exp_avg_sq"]) for p in live],
                group["step"],
                group["lr"],
                beta1,
                beta2,
                self.config.eps,
                group["weight_decay"],
            )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
