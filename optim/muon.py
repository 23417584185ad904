"""Muon (Jordan et al.): the momentum, orthogonalised by Newton-Schulz, without gathering it.

    M = b M + G       X_0 = (G + b M) / |G + b M|       X_(k+1) = a X_k + (b' S + c S^2) X_k  with  S = X_k X_k^T
    x = x - lr wd x - lr 0.2 sqrt(max(m, n)) X_5

The scale gives the root mean square of an AdamW update (Liu et al., *Muon is Scalable for LLM Training*), so that
AdamW's learning rate and decay serve.

Every iterate is X_0 p(A) with A = X_0^T X_0 (n x n) and p a polynomial, which all ranks compute alike: for m >= n a rank
sums A over the shard axis (n^2 numbers) and multiplies its own rows by p(A). For m < n one all-to-all turns rows into
columns, the Gram matrix is m x m, and a second all-to-all turns the result back (m n / N numbers a rank each way). No
rank ever holds the whole. The polynomial is computed in float32 (float64 in float64).

State bytes per parameter: 4 (`momentum`, split like the parameter).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.optim.adamw import state_dtype
from rowwise.optim.common import AdamBase
from rowwise.optim.rule import Batch, all_reduce_, apply_, pick
from rowwise.optim.transpose import from_tall, to_tall

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


@dataclass(frozen=True, kw_only=True)
class MuonConfig(AdamBase):
    """Hidden matrices follow Muon, everything else AdamW with the same learning rate."""

    name: Literal["muon"] = "muon"
    momentum: float = 0.95

    def check(self) -> None:
        super().check()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum}: from 0 to below 1")


def newton_schulz_polynomial(gram: Tensor) -> Tensor:
    """P (k, k) with X_5 = X P for any X whose X^T X = `gram`: the normalisation and all five iterations."""
    norm = gram.diagonal().sum().sqrt()
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))  # a gradient of zeros stays one
    a, b, c = COEFFICIENTS
    gram = gram / scale**2
    identity = torch.eye(gram.size(0), dtype=gram.dtype, device=gram.device)
    s = gram
    p = a * identity + b * s + c * s @ s
    for _ in range(ITERATIONS - 1):
        s = p @ gram @ p  # the iterate's own Gram matrix: p and gram commute
        p = p @ (a * identity + b * s + c * s @ s)
    return p / scale


class Muon:
    """State: `momentum` (m, n), split like the parameter."""

    name = "muon"
    fused = False
    rounds = False
    weightwise: ClassVar[dict[str, int]] = {"momentum": 0}

    def __init__(self, momentum: float):
        self._momentum = momentum

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(p, dtype=state_dtype(p))}

    def step_(self, batch: Batch) -> None:
        momenta = pick(batch, "momentum")
        torch._foreach_mul_(momenta, self._momentum)
        torch._foreach_add_(momenta, batch.grads)
        nesterov = torch._foreach_add(batch.grads, momenta, alpha=self._momentum)
        apply_(batch, orthogonalise(list(nesterov), batch.shapes, batch.group))


def orthogonalise(xs: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup | None) -> list[Tensor]:
    """0.2 sqrt(max(m, n)) X_5 of every logical matrix, given and returned as local rows; `group` is the shard axis."""
    tall = to_tall(xs, shapes, group)
    grams = [x.T @ x for x in tall]
    all_reduce_(grams, group)
    results = [
        x @ newton_schulz_polynomial(gram) * (0.2 * math.sqrt(max(shape)))
        for x, gram, shape in zip(tall, grams, shapes, strict=True)
    ]
    return from_tall(results, shapes, group)
