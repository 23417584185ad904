"""Dropout that is the same on every layout, whenever it is computed and made again.

    y = x m / (1 - p)        m = [u >= p]

u is uniform, drawn from the counter stream of (seed, layer) for the number of its token in the order of the data and its feature:
nothing hangs on which rank has the token, with which others, or how often it is computed. The backward draws m anew and keeps
nothing. Communicates nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowwise.kernels.philox import philox_words
from rowwise.kernels.torch_compiler import left_to_python
from rowwise.parallel.activations.compress import Tokens
from rowwise.parallel.activations.saved import sequences_of_forward

PORTION = 1 << 20  # numbers that are drawn at once, each of which takes several words


@dataclass(frozen=True)
class Dropout:
    """That of one layer. `share`: p; `key`: of its stream; `tokens`: which of each sequence this rank has."""

    share: float
    key: int
    tokens: Tokens

    @left_to_python
    def __call__(self, x: Tensor) -> Tensor:
        """Drops of x (B, S, n); nothing in a forward that nobody learns from."""
        first = sequences_of_forward()
        if first is None:
            return x
        dropped: Tensor = _Dropped.apply(x, self, self.tokens.numbers(first, x.size(0), attention=False))
        return dropped

    def apply_(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Multiplies the rows of x (T, n), which are of the tokens of these numbers, by m / (1 - p), in place."""
        for rows in _portions(*x.shape):
            kept = uniform(self.key, numbers[rows], x.size(1)) >= self.share * 2.0**32
            x[rows].mul_(kept).mul_(1 / (1 - self.share))
        return x


def uniform(key: int, numbers: Tensor, columns: int) -> Tensor:
    """Draws 32-bit words (T, n) for tokens of these numbers: int64. A token has as many whole counters of the stream as n takes;
    padding, of number -1, has those of token 0."""
    counters = -(-columns // 4)
    first = numbers.clamp(min=0)[:, None] * counters
    words = philox_words(key, (first + torch.arange(counters, device=numbers.device)).flatten())
    return torch.stack(words, dim=1).view(len(numbers), 4 * counters)[:, :columns]


def _portions(rows: int, columns: int) -> Iterator[slice]:
    some = max(1, PORTION // columns)
    return (slice(first, first + some) for first in range(0, rows, some))


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout, numbers: Tensor) -> Tensor:
        ctx.dropout, ctx.numbers = dropout, numbers
        return dropout.apply_(x.reshape(-1, x.size(-1)).clone(), numbers).view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.dropout.apply_(dy.reshape(-1, dy.size(-1)).clone(), ctx.numbers).view_as(dy)
        return dx, None, None
