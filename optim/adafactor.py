"""Adafactor (Shazeer & Stern, *Adaptive Learning Rates with Sublinear Memory Cost*), with an absolute learning rate.

    b = 1 - t^-0.8
    R = b R + (1 - b) mean over columns of (g^2 + e)       C = b C + (1 - b) mean over rows of (g^2 + e)
    U = g / sqrt(R C / mean(R))       U = U / max(1, rms(U) / d)       x = x - lr wd x - lr U

e = 1e-30, d = `clip_threshold`. Row-local: R (m) is split like the rows; C (n) is the same on every rank. Crosses the
shard axis, in two messages for each 16 MiB of matrices: n numbers, then 1. mean(R) needs none: it equals mean(C).
Vectors keep the whole second moment. State bytes of a matrix: 4 (m / N + n).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rowwise.conf.option import Fixed, MayChange
from rowwise.kernels import torch_lists
from rowwise.optim.adamw import state_dtype
from rowwise.optim.common import OptimBase
from rowwise.optim.rule import Batch, Rule, all_reduce_, pick, row_slices, rows_like, zeros_of

TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig(OptimBase):
    """`decay`: the second moment forgets with 1 - t^-decay. `clip_threshold`: the largest root mean square of an update."""

    name: Fixed[Literal["adafactor"]] = "adafactor"
    decay: MayChange[float] = 0.8
    clip_threshold: MayChange[float] = 1.0

    def check(self) -> None:
        super().check()
        if not (0 < self.decay <= 1 and self.clip_threshold > 0):
            raise ValueError("optim=adafactor: decay is above 0 and at most 1, clip_threshold is above 0")

    def new_rule(self) -> Rule:
        return Adafactor(self.decay, self.clip_threshold)


def square_sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of g^2 + e of local rows (m, n) over columns (m) and over rows (n)."""
    over_columns, over_rows = g.new_empty(g.size(0)), g.new_zeros(g.size(1))
    for rows in row_slices(g):
        square = g[rows].square().add_(TINY)
        over_columns[rows] = square.sum(1)
        over_rows += square.sum(0)
    return over_columns, over_rows


def squared_norm(g: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Computes |U|^2 of U = g_ij a_i b_j, without U: a^2 (g^2) b^2."""
    total = g.new_zeros(())
    for rows in row_slices(g):
        total += by_row[rows].square() @ (g[rows].square() @ by_column.square())
    return total


def subtract_(x: Tensor, g: Tensor, by_row: Tensor, by_column: Tensor) -> None:
    """Subtracts in place: x -= g_ij a_i b_j."""
    for rows in row_slices(g):
        x[rows] -= (g[rows] * by_column).mul_(by_row[rows, None])


class Adafactor:
    """State of a matrix: `row` (m), `column` (n); of a vector: `exp_avg_sq`."""

    name = "adafactor"
    fused = False
    rounds = rounds_on_host = False
    by_rows = False
    shared = False
    weightwise: ClassVar[dict[str, int]] = {}

    def __init__(self, decay: float, clip_threshold: float):
        self._decay, self._clip = decay, clip_threshold

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        if p.ndim < 2:
            return {"exp_avg_sq": zeros_of(p, state_dtype(p))}
        column = torch.zeros(p.size(1), dtype=state_dtype(p), device=p.device)
        return {"row": rows_like(p, None, state_dtype(p)), "column": column}

    def step_(self, batch: Batch) -> None:
        forget = 1 - batch.step**-self._decay
        (self._matrices if len(batch.shapes[0]) == 2 else self._vectors)(batch, forget)

    def _matrices(self, batch: Batch, forget: float) -> None:
        sums = [square_sums(g) for g in batch.grads]
        all_reduce_([over_rows for _, over_rows in sums], batch.group)
        for state, (over_columns, over_rows), (m, n) in zip(batch.states, sums, batch.shapes, strict=True):
            state["row"].lerp_(over_columns / n, 1 - forget)
            state["column"].lerp_(over_rows / m, 1 - forget)
        factors = [((s["row"] / s["column"].mean()).rsqrt(), s["column"].rsqrt()) for s in batch.states]
        squares = [squared_norm(g, *factor) for g, factor in zip(batch.grads, factors, strict=True)]
        rates = self._rates(batch, squares)
        for x, g, (by_row, by_column), rate in zip(batch.params, batch.grads, factors, rates, strict=True):
            x.mul_(1 - batch.lr * batch.weight_decay)
            subtract_(x, g, by_row * rate, by_column)

    def _vectors(self, batch: Batch, forget: float) -> None:
        second = pick(batch, "exp_avg_sq")
        torch_lists.lerp_(second, [g.square() + TINY for g in batch.grads], 1 - forget)
        directions = [g * v.rsqrt() for g, v in zip(batch.grads, second, strict=True)]
        rates = self._rates(batch, [u.square().sum() for u in directions])
        for x, u, rate in zip(batch.params, directions, rates, strict=True):
            x.mul_(1 - batch.lr * batch.weight_decay).sub_(u * rate)

    def _rates(self, batch: Batch, squares: list[Tensor]) -> list[Tensor]:
        """lr / max(1, rms(U) / d) of every tensor."""
        all_reduce_(squares, batch.group)
        norms = [(square / shape.numel()).sqrt() for square, shape in zip(squares, batch.shapes, strict=True)]
        return [batch.lr / torch.clamp(norm / self._clip, min=1.0) for norm in norms]
