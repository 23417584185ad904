"""The Triton form of `rowwise.kernels.rounding`; the formula stands there."""

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.philox_triton import signed_64

ELEMENTS_PER_PROGRAM = 1024
WORDS = 4  # of one Philox call


@triton.jit
def _words(key, counter):
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def random_16(key, first, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the random bits (n, WIDTH) int32 of the runs of WIDTH elements that begin at `first` (n,) int64.

    ALIGNED: every `first` is a multiple of four, so that one Philox call serves four neighbours; else each element
    makes a call of its own and takes one word.
    """
    if ALIGNED:
        w0, w1, w2, w3 = _words(key, (first // 4)[:, None] + tl.arange(0, WIDTH // 4)[None, :])
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        element = first[:, None] + tl.arange(0, WIDTH)[None, :]
        w0, w1, w2, w3 = _words(key, element // 4)
        which = element % 4
        word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return (word & 0xFFFF).to(tl.int32)


@triton.jit
def round_16(x, random):
    """Rounds x float32 to bfloat16 with `random` in [0, 2^16) int32 of the same shape."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    random = tl.where(magnitude > 0x7F7F0000, 0x8000, random)  # above the largest bfloat16: to nearest
    bits = tl.where(magnitude > 0x7F800000, bits | 0x400000, bits + random)  # NaN stays NaN
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """Rounds x float32 to `dtype`, to nearest, ties to even. (Of itself Triton's interpreter makes bfloat16 by cutting off.)"""
    if dtype == tl.bfloat16:
        return round_16(x, 0x7FFF + ((x.to(tl.int32, bitcast=True) >> 16) & 1))
    return x.to(dtype)


@triton.jit
def store_number(out, place, x, inside, key, first, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Stores x float32 (n, WIDTH): into bfloat16 rounded with the bits of the runs that begin at `first` (n,)."""
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out + place, round_16(x, random_16(key, first, WIDTH, ALIGNED)), mask=inside)
    else:
        tl.store(out + place, x, mask=inside)


@triton.jit
def round_kernel(x, out, key, start, count, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, 1)
    place = first[:, None] + tl.arange(0, WIDTH)[None, :]
    numbers = tl.load(x + place, mask=place < count, other=0.0)
    random = random_16(key, start + first, WIDTH, ALIGNED)
    tl.store(out + place, round_16(numbers, random), mask=place < count)


def round_triton_(x: Tensor, out: Tensor, key: int, start: int) -> None:
    count = x.numel()
    if count:
        round_kernel[(triton.cdiv(count, ELEMENTS_PER_PROGRAM),)](
            x, out, signed_64(key), start, count, WIDTH=ELEMENTS_PER_PROGRAM, ALIGNED=start % WORDS == 0
        )
