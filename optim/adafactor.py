"""Adafactor (Shazeer & Stern, *Adaptive Learning Rates with Sublinear Memory Cost*), with an absolute learning rate.

    b = 1 - t^-0.8
    R = b R + (1 - b) mean over columns of (g^2 + e)       C = b C + (1 - b) mean over rows of (g^2 + e)
    U = g / sqrt(R C / mean(R))       U = U / max(1, rms(U) / d)       x = x - lr wd x - lr U

e = 1e-30, d = `clip_threshold`. Row-local: R (m) is split like the rows; C (n) is the same on every rank. Crosses the
shard axis, for all matrices in two messages a step: n numbers, then 1. mean(R) needs none: it equals mean(C).
Vectors keep the whole second moment. State bytes of a matrix: 4 (m / N + n).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rowwise.optim.adamw import state_dtype
from rowwise.optim.common import OptimBase
from rowwise.optim.rule import Batch, all_reduce_, apply_, pick, rows_like

TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig(OptimBase):
    """`decay`: the second moment forgets with 1 - t^-decay. `clip_threshold`: the largest root mean square of an update."""

    name: Literal["adafactor"] = "adafactor"
    decay: float = 0.8
    clip_threshold: float = 1.0

    def check(self) -> None:
        super().check()
        if not (0 < self.decay <= 1 and self.clip_threshold > 0):
            raise ValueError("optim=adafactor: decay is above 0 and at most 1, clip_threshold is above 0")


def factored_direction(g: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """g / sqrt(R C / mean(C)), of local rows (m, n), (m), (n)."""
    return g * torch.outer((row / column.mean()).rsqrt(), column.rsqrt())


class Adafactor:
    """State of a matrix: `row` (m), `column` (n); of a vector: `exp_avg_sq`."""

    name = "adafactor"
    rounds = False

    def __init__(self, decay: float, clip_threshold: float):
        self._decay, self._clip = decay, clip_threshold

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        if p.ndim < 2:
            return {"exp_avg_sq": torch.zeros_like(p, dtype=state_dtype(p))}
        column = torch.zeros(p.size(1), dtype=state_dtype(p), device=p.device)
        return {"row": rows_like(p, None, state_dtype(p)), "column": column}

    def step_(self, batch: Batch) -> None:
        forget = 1 - batch.step**-self._decay
        factored = len(batch.shapes[0]) == 2
        directions = self._matrices(batch, forget) if factored else self._vectors(batch, forget)
        squares = [u.square().sum(dtype=torch.float64 if u.dtype == torch.float64 else None) for u in directions]
        all_reduce_(squares, batch.group)
        for u, square, shape in zip(directions, squares, batch.shapes, strict=True):
            u /= torch.clamp((square / shape.numel()).sqrt() / self._clip, min=1.0)
        apply_(batch, directions)

    def _matrices(self, batch: Batch, forget: float) -> list[Tensor]:
        squares = [g.square() + TINY for g in batch.grads]
        columns = [s.sum(0) / shape[0] for s, shape in zip(squares, batch.shapes, strict=True)]
        all_reduce_(columns, batch.group)
        torch._foreach_lerp_(pick(batch, "row"), [s.mean(1) for s in squares], 1 - forget)
        torch._foreach_lerp_(pick(batch, "column"), columns, 1 - forget)
        return [factored_direction(g, s["row"], s["column"]) for g, s in zip(batch.grads, batch.states, strict=True)]

    def _vectors(self, batch: Batch, forget: float) -> list[Tensor]:
        second = pick(batch, "exp_avg_sq")
        torch._foreach_lerp_(second, [g.square() + TINY for g in batch.grads], 1 - forget)
        return [g * v.rsqrt() for g, v in zip(batch.grads, second, strict=True)]
