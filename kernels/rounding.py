"""Stochastic rounding of float32 to bfloat16: unbiased, so that updates too small for bfloat16 are not lost.

A bfloat16 is the upper half of a float32. 16 random bits are added to the lower half, which is then cut off: a number
that lies the share s of the way from one bfloat16 to the next one away from zero becomes that next one with
probability s (to 16 bits), so that its expectation is the number itself.

    element i takes the lower 16 bits of word i mod 4 of Philox-4x32-10 at counter i div 4 under its key

with i the *logical* index of the element: the same number is rounded the same way wherever its row lives.

Not a number and the infinities stay what they are, and what bfloat16 holds exactly is not changed. Above the largest
finite bfloat16 there is no next one; there the number is rounded to nearest: to infinity in the upper half of that
interval, as a plain conversion does, and never below.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_numba, use_triton
from rowwise.kernels.philox import philox_words
from rowwise.kernels.portions import row_portions

Rounding = Sequence[tuple[int, int]] | None  # of each bfloat16 parameter: key, logical index of its first element
LARGEST = torch.finfo(torch.bfloat16).max


def round_bf16_(x: Tensor, out: Tensor, key: int, start: int) -> None:
    """Rounds x (contiguous float32 of any shape) into `out`, contiguous bfloat16 of x's shape. `start` is the logical index of
    its first element.

    Any slice of a tensor, given with its own start, is rounded as it is within the whole. Communicates nothing.
    """
    if use_triton(x.device):
        from rowwise.kernels.rounding_triton import round_triton_

        round_triton_(x, out, key, start)
    elif use_numba([out]):
        from rowwise.kernels.rounding_numba import round_numba_

        round_numba_(x, out, key, start)
    else:
        round_reference_(x, out, key, start)


def round_reference_(x: Tensor, out: Tensor, key: int, start: int) -> None:
    """Computes `round_bf16_` in plain torch."""
    flat, flat_out = x.view(-1), out.view(-1)
    for part in row_portions(flat.numel(), 1):
        # Nothing of a portion is held while the next one's bits are drawn.
        flat_out[part] = _round(flat[part], random_16(key, start + part.start, part.stop - part.start, x.device))


def random_16(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Returns the random bits of elements [start, start + count): (count,) int32 in [0, 2^16)."""
    first, last = start // 4, -(-(start + count) // 4)
    words = philox_words(key, torch.arange(first, last, dtype=torch.int64, device=device))
    lower = torch.empty(last - first, 4, dtype=torch.int32, device=device)
    for j, word in enumerate(words):
        torch.bitwise_and(word, 0xFFFF, out=word)
        lower[:, j] = word
    return lower.view(-1)[start - 4 * first :][:count]


def _round(x: Tensor, random: Tensor) -> Tensor:
    """x (n,) float32 with `random` (n,) added below what bfloat16 keeps; `random` is used up."""
    random += x.view(torch.int32)
    rounded = (random >> 16).to(torch.int16).view(torch.bfloat16)
    if x.abs().max() <= LARGEST:
        return rounded
    return torch.where(x.abs() <= LARGEST, rounded, x.bfloat16())
