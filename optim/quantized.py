"""AdamW and Lion with 8-bit states (Dettmers et al., *8-bit Optimizers via Block-wise Quantization*), row by row.

Moments are 8-bit codes with one float32 absolute maximum per block; a step reads them, updates in float32 (float64 in
float64) and writes them back (`kernels.blockwise`, `kernels.moment_pair`, `kernels.adamw8bit`). The paper cuts blocks
from the flattened local tensor, so its states depend on the layout. Here blocks of 256 run along the last dim and never
cross a row, and who gets 8 bits is decided on the logical shape: matrices of at least 4,096 elements. Vectors, smaller
matrices and (the paper's stable embedding) embeddings keep float32.

State bytes per parameter of a matrix with n columns: 1 + 4 ceil(n / 256) / n for each moment, that is 2.03 for AdamW and
1.02 for Lion. Nothing crosses ranks.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rowwise.conf.option import Fixed, MayChange
from rowwise.kernels.adamw8bit import adamw8bit_
from rowwise.kernels.blockwise import blocks_per_row, code_book, code_table
from rowwise.kernels.lion8bit import lion8bit_
from rowwise.optim.common import AdamBase, OptimBase, check_betas
from rowwise.optim.rule import Batch, Rule, rows_like

SMALLEST = 4096  # elements of the logical matrix; below it 8 bits save nothing worth their error


@dataclass(frozen=True, kw_only=True)
class AdamW8bitConfig(AdamBase):
    name: Fixed[Literal["adamw8bit"]] = "adamw8bit"

    def new_rule(self) -> Rule:
        return AdamW8bit(self.betas, self.eps)


@dataclass(frozen=True, kw_only=True)
class Lion8bitConfig(OptimBase):
    """`betas`: of the sign's mixture and of the momentum."""

    name: Fixed[Literal["lion8bit"]] = "lion8bit"
    lr: MayChange[float] = 1e-3
    weight_decay: MayChange[float] = 0.3
    betas: MayChange[list[float]] = field(default_factory=lambda: [0.9, 0.99])

    def check(self) -> None:
        super().check()
        check_betas(self.betas)

    def new_rule(self) -> Rule:
        return Lion8bit(self.betas)


def is_quantisable(shape: torch.Size) -> bool:
    """Says whether a state of this logical shape may be kept in 8 bits."""
    return len(shape) == 2 and shape.numel() >= SMALLEST


def zero_code(signed: bool) -> int:
    """Returns the code that means 0."""
    return int((code_book(signed) == 0).nonzero())


def new_moment(p: Tensor, columns: int, key: str, signed: bool) -> dict[str, Tensor]:
    """Makes a moment of zeros in 8 bits, `columns` wide, with the rows of `p`: `<key>.codes` and `<key>.absmax`. What codes are looked
    up in stays for the process (131 kB), and is made here, so that no step holds more than another."""
    if p.dtype != torch.float64:
        code_table(signed, p.device)
    codes = rows_like(p, columns, torch.uint8)
    return {
        f"{key}.codes": codes.fill_(zero_code(signed)),
        f"{key}.absmax": rows_like(p, blocks_per_row(columns), torch.float32),
    }


def moments(batch: Batch, key: str) -> list[tuple[Tensor, Tensor]]:
    """Returns (codes, absmax) of every parameter."""
    return [(state[f"{key}.codes"], state[f"{key}.absmax"]) for state in batch.states]


class AdamW8bit:
    """State: `exp_avg` in the signed code book, `exp_avg_sq` in the unsigned one."""

    name = "adamw8bit"
    fused = True
    rounds = rounds_on_host = True
    by_rows = True
    shared = False
    weightwise: ClassVar[dict[str, int]] = {"exp_avg.codes": zero_code(True), "exp_avg_sq.codes": zero_code(False)}

    def __init__(self, betas: list[float], eps: float):
        (self.beta1, self._beta2), self._eps = betas, eps

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return new_moment(p, p.size(1), "exp_avg", True) | new_moment(p, p.size(1), "exp_avg_sq", False)

    def step_(self, batch: Batch) -> None:
        rates = (batch.step, batch.lr, self.beta1, self._beta2, self._eps, batch.weight_decay)
        first, second = moments(batch, "exp_avg"), moments(batch, "exp_avg_sq")
        adamw8bit_(batch.params, batch.grads, first, second, *rates, batch.rounding_if_narrow())


class Lion8bit:
    """State: `exp_avg` in the signed code book."""

    name = "lion8bit"
    fused = True
    rounds = rounds_on_host = True
    by_rows = True
    shared = False
    weightwise: ClassVar[dict[str, int]] = {"exp_avg.codes": zero_code(True)}

    def __init__(self, betas: list[float]):
        self.beta1, self._beta2 = betas

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return new_moment(p, p.size(1), "exp_avg", True)

    def step_(self, batch: Batch) -> None:
        rates = (batch.lr, self.beta1, self._beta2, batch.weight_decay)
        lion8bit_(batch.params, batch.grads, moments(batch, "exp_avg"), *rates, batch.rounding_if_narrow())
