"""The Lion-kappa family (Chen et al., *Lion Secretly Solves Constrained Optimization*): Lion with another norm than l1.

    x = x - lr (grad kappa(b1 m + (1 - b1) g) + wd x)          m = b2 m + (1 - b2) g

It minimises the loss with x in a ball of the dual norm, which the iterates enter and stay in. Each kappa carries the factor
that gives its gradient the root mean square 1 of Lion's signs, so that one learning rate serves all. C is m x n:

| kappa | grad kappa(C) | the ball | crosses the shard axis |
|---|---|---|---|
| l1 | sign(C): Lion itself (`optim.lion`) | every weight <= 1 / wd | nothing |
| l2 | sqrt(m n) C / norm(C) | norm of the matrix <= sqrt(m n) / wd | 1 number |
| rows | sqrt(n) C_i / norm(C_i), row by row | norm of a row <= sqrt(n) / wd | nothing |
| huber | C / delta, cut at -1 and 1 | every weight <= 1 / wd | nothing |
| nuclear | sqrt(max(m, n)) times the orthogonal factor of C, by Newton-Schulz | spectral norm <= 1.2 sqrt(max(m, n)) / wd | as muon |

The last is Muon with decay (Chen et al., *Muon Optimizes Under Spectral Norm Constraints*): with betas (b^2, b), 0.2 of its
learning rate and 5 times its decay the steps are the same. Newton-Schulz leaves singular values between 0.7 and 1.2.
Hidden matrices follow kappa, everything else Lion. State bytes per parameter: 4 in fp32.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.optim.adamw import state_dtype
from rowwise.optim.muon import AS_ADAMW, orthogonalise
from rowwise.optim.rule import Batch, all_reduce_, apply_, pick, zeros_of

Kappa = Literal["l1", "l2", "rows", "huber", "nuclear"]


def gradients_of_kappa(
    kappa: Kappa, cs: list[Tensor], shapes: list[torch.Size], delta: float, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Computes grad kappa(C) of every logical matrix, given and returned as local rows; `group` is the shard axis. Zero where C
    is."""
    if kappa == "huber":
        return [(c / delta).clamp_(-1, 1) for c in cs]
    if kappa == "rows":
        return [c * _inverse(torch.linalg.vector_norm(c, dim=1, keepdim=True)) * math.sqrt(c.size(1)) for c in cs]
    if kappa == "nuclear":
        return [c / AS_ADAMW for c in orthogonalise(cs, shapes, group)]
    assert kappa == "l2", "l1 is Lion"
    squares = [c.square().sum().reshape(1) for c in cs]
    all_reduce_(squares, group)
    return [
        c * _inverse(square.sqrt()) * math.sqrt(shape.numel())
        for c, square, shape in zip(cs, squares, shapes, strict=True)
    ]


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 for 0."""
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


class LionKappa:
    """State: `exp_avg`, split like the parameter."""

    fused = False
    rounds = rounds_on_host = False
    by_rows = False
    weightwise: ClassVar[dict[str, int]] = {"exp_avg": 0}

    def __init__(self, kappa: Kappa, betas: list[float], delta: float):
        self.name, self.shared = f"lion_{kappa}", kappa == "nuclear"
        self._kappa, self._delta = kappa, delta
        self.beta1, self._beta2 = betas

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": zeros_of(p, state_dtype(p))}

    def step_(self, batch: Batch) -> None:
        momenta = pick(batch, "exp_avg")
        mixed = torch_lists.lerp(momenta, batch.grads, 1 - self.beta1)
        torch_lists.lerp_(momenta, batch.grads, 1 - self._beta2)
        apply_(batch, gradients_of_kappa(self._kappa, list(mixed), batch.shapes, self._delta, batch.group))
