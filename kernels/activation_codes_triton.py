"""The Triton form of `rowwise.kernels.activation_codes`; the formulas stand there.

A program takes BLOCKS groups, wherever in the rows they lie: group b of the tensor is group b mod J of row b div J.
"""

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.activation_codes import Codes, Groups
from rowwise.kernels.philox_triton import signed_64
from rowwise.kernels.rounding_triton import rounded_to

NUMBERS = 1024  # of a program: 8 a thread with Triton's four warps


@triton.jit
def _places(rows, columns, per_row, width, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Of this program's groups: number (BLOCKS,), places (BLOCKS, WIDTH) of their numbers, and masks of both."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % per_row) * width
    lane = tl.arange(0, WIDTH)
    exists = block < rows * per_row
    inside = exists[:, None] & (lane[None, :] < width) & (column[:, None] + lane[None, :] < columns)
    return block, ((block // per_row) * columns + column)[:, None] + lane[None, :], exists, inside


@triton.jit
def _uniform(key, first, CALLS: tl.constexpr):
    """u (BLOCKS, 8 CALLS) of the groups whose first counter is `first` (BLOCKS,)."""
    counter = first[:, None] + tl.arange(0, CALLS)[None, :]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, high, zero, zero)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(word & 0xFFFF, word >> 16).to(tl.float32) * (2.0**-16)


@triton.jit
def _own_range(numbers, inside, BLOCKS: tl.constexpr):
    """The least number of each group, and the worth of a code; NaN where they are not finite."""
    infinity: tl.constexpr = float("inf")
    least = tl.min(tl.where(inside, numbers, infinity), axis=1)
    most = tl.max(tl.where(inside, numbers, -infinity), axis=1)
    usual = tl.min((tl.abs(numbers) < infinity).to(tl.int32), axis=1)  # NaN is not below infinity
    worth = tl.div_rn(most - least, tl.full((BLOCKS,), 255.0, tl.float32))
    finite = (usual != 0) & (worth < infinity)
    return tl.where(finite, least, float("nan")), tl.where(finite, worth, float("nan"))


@triton.jit
def encode_kernel(
    x, codes, ranges, tokens, key, rows, columns, per_row, width, count, first, repeat,
    GIVEN: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, place, exists, inside = _places(rows, columns, per_row, width, BLOCKS, WIDTH)
    numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:  # one range of a group for all tokens
        least = tl.load(ranges + 2 * (block % per_row), mask=exists, other=0.0)
        worth = tl.load(ranges + 2 * (block % per_row) + 1, mask=exists, other=0.0)
    else:
        least, worth = _own_range(numbers, inside, BLOCKS)
        tl.store(ranges + 2 * block, least, mask=exists)
        tl.store(ranges + 2 * block + 1, worth, mask=exists)
    usable = worth > 0  # neither one number all over, nor NaN
    divisor = tl.where(usable, worth, 1.0)
    number = tl.div_rn(numbers - least[:, None], tl.broadcast_to(divisor[:, None], (BLOCKS, WIDTH)))
    token = tl.load(tokens + block // per_row, mask=exists, other=0)
    group = (first + block % per_row) // repeat
    number += _uniform(key, (token * count + group) * ((width + 7) // 8), WIDTH // 8)
    number = tl.minimum(tl.maximum(tl.floor(number), 0.0), 255.0)
    is_number = usable[:, None] & (number == number)
    tl.store(codes + place, tl.where(is_number, number, 0.0).to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def decode_kernel(
    codes, ranges, out, rows, columns, per_row, width,
    GIVEN: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, place, exists, inside = _places(rows, columns, per_row, width, BLOCKS, WIDTH)
    group = block % per_row if GIVEN else block
    least = tl.load(ranges + 2 * group, mask=exists, other=0.0)
    worth = tl.load(ranges + 2 * group + 1, mask=exists, other=0.0)
    numbers = tl.load(codes + place, mask=inside, other=0).to(tl.float32) * worth[:, None] + least[:, None]
    tl.store(out + place, rounded_to(numbers, out.dtype.element_ty), mask=inside)


def _tile(width: int) -> dict[str, int]:
    """How many groups a program takes, and how wide its tile is."""
    wide = max(8, triton.next_power_of_2(width))
    return {"BLOCKS": max(1, NUMBERS // wide), "WIDTH": wide}


def encode_triton_(x: Tensor, made: Codes, groups: Groups, key: int, tokens: Tensor, given: bool = False) -> None:
    (rows, columns), per_row = x.shape, made.ranges.size(1)
    if x.numel():
        tile = _tile(groups.width)
        encode_kernel[(triton.cdiv(rows * per_row, tile["BLOCKS"]),)](
            x, *made, tokens, signed_64(key), rows, columns, per_row, groups.width,
            groups.count, groups.first, groups.repeat, GIVEN=given, **tile,
        )  # fmt: skip


def decode_triton_(kept: Codes, width: int, out: Tensor) -> None:
    (rows, columns), per_row = out.shape, kept.ranges.size(1)
    if out.numel():
        tile, given = _tile(width), rows > 1 and kept.ranges.stride(0) == 0  # of one token both are the same
        decode_kernel[(triton.cdiv(rows * per_row, tile["BLOCKS"]),)](
            *kept, out, rows, columns, per_row, width, GIVEN=given, **tile
        )
