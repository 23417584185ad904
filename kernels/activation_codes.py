"""8-bit codes of what a layer keeps for its backward (Pan et al., *Mesa: A Memory-saving Training Framework for Transformers*).

The numbers of a token lie in groups: a head each, or 256 channels. Of a group x with least number l and largest h

    s = (h - l) / 255            code = floor((x - l) / s + u), in 0 .. 255            x^ = l + code s

u is uniform in [0, 1), so that x^ is x on the mean (to 16 bits). It is drawn from a counter stream by the number's *logical*
place: token t of the run, group g of the G that a token has, place j of the W in a group. Of Philox-4x32-10 under the key of
the stream, at counter (t G + g) ceil(W / 8) + j div 8, it is 16 bits of word (j mod 8) div 2: the lower ones for an even j.
The same number gets the same code wherever its token and its head are.

l and h are the group's own, in float32: 8 bytes a group. A group with a number that is not finite, or whose h - l is above
float32's largest number, comes back as NaN. Or they are given, the same for all tokens, as in the paper, which has running
means over batches of them: then they are kept once, and what lies outside gets the nearest code, NaN code 0.

Shapes: N tokens, C numbers a token, in J groups; the last may be narrower. All arithmetic is in float32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.philox import philox_words
from rowwise.kernels.portions import row_portions

CHANNELS = 256  # of a group where there are no heads
RANGE_BYTES = 8  # of a group: its least number and the worth of a code
LARGEST = 255
BITS = 16  # of a uniform number
A_CALL = 8  # uniform numbers that one Philox call gives


@dataclass(frozen=True)
class Groups:
    """How the numbers of a token are grouped. `width`: of a group; `count`: groups that a token has in all; what is here begins
    with number `first` of them, and each comes `repeat` times, counted in `first` too (key heads that ranks repeat)."""

    width: int
    count: int
    first: int = 0
    repeat: int = 1


class Codes(NamedTuple):
    """What is kept of x (N, C): codes (N, C) uint8, and ranges (N, J, 2) float32, the least number and the worth of a code; of
    ranges that are given, one for all tokens, expanded."""

    codes: Tensor
    ranges: Tensor


def channel_groups(columns: int) -> Groups:
    """Groups a token's `columns` numbers by CHANNELS."""
    return Groups(min(columns, CHANNELS), -(-columns // CHANNELS))


def code_bytes(columns: int, width: int = CHANNELS) -> int:
    """Counts the bytes that a token's `columns` numbers take, in groups of `width`."""
    return columns + RANGE_BYTES * -(-columns // width)


def encode(x: Tensor, groups: Groups, key: int, tokens: Tensor, within: Tensor | None = None) -> Codes:
    """Rounds x (N, C), contiguous, of any floating dtype, to 8 bits. `tokens` (N,) int64: which of the run's each row is;
    `within` (J, 2) float32: the least number and the worth of a code of each group here, finite; None: each token's own.

    Any rows and groups of a whole, given with their places, get the codes that they have within the whole. Communicates
    nothing.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    if within is None:
        ranges = torch.empty(rows, -(-columns // groups.width), 2, dtype=torch.float32, device=x.device)
    else:
        ranges = within.expand(rows, -1, -1)
    made, given = Codes(codes, ranges), within is not None
    if use_triton(x.device):
        from rowwise.kernels.activation_codes_triton import encode_triton_

        encode_triton_(x, made, groups, key, tokens, given)
    else:
        encode_reference_(x, made, groups, key, tokens, given)
    return made


def extremes(x: Tensor, groups: Groups, tokens: Tensor) -> Tensor:
    """Finds minus the least number, and the largest, that each group of x (N, C) has over all tokens: (J, 2) float32, of which
    larger ones say more. Rows whose token is negative are none; where a number is NaN, both are infinite. Communicates nothing."""
    least, most = _in_groups(x, groups.width).aminmax(dim=2)
    found = torch.stack((-least, most), dim=2).float()
    found = found.masked_fill_((tokens < 0)[:, None, None], -torch.inf)
    none = found.new_full((1, *found.shape[1:]), -torch.inf)
    return torch.cat((found, none)).amax(0).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def decode(kept: Codes, width: int, dtype: torch.dtype) -> Tensor:
    """Gives x^ (N, C) behind codes whose groups are `width` wide, rounded to `dtype`. Communicates nothing."""
    out = torch.empty(kept.codes.shape, dtype=dtype, device=kept.codes.device)
    if use_triton(out.device):
        from rowwise.kernels.activation_codes_triton import decode_triton_

        decode_triton_(kept, width, out)
    else:
        decode_reference_(kept, width, out)
    return out


def encode_reference_(x: Tensor, made: Codes, groups: Groups, key: int, tokens: Tensor, given: bool = False) -> None:
    """Computes `encode` in plain torch. `given`: its ranges are there."""
    rows, columns = x.shape
    for part in row_portions(rows, columns):
        x_NJW = _in_groups(x[part].float(), groups.width)
        if not given:
            made.ranges[part] = _own_ranges(x_NJW)
        least, worth = made.ranges[part].unsqueeze(3).unbind(2)
        usable = worth > 0  # neither one number all over, nor NaN
        number = (x_NJW - least).div_(worth.where(usable, 1.0))
        number.add_(_uniform(x_NJW.shape, groups, key, tokens[part])).floor_().clamp_(0, LARGEST)
        if given:  # own ranges are none where a number is NaN
            number.nan_to_num_(nan=0.0)
        codes = number.where(usable, 0.0).to(torch.uint8)
        made.codes[part] = codes.flatten(1)[:, :columns]


def _own_ranges(x_NJW: Tensor) -> Tensor:
    """(N, J, 2): the least number and the worth of a code; NaN where they are not finite."""
    least, most = x_NJW.aminmax(dim=2)
    worth = (most - least) / LARGEST
    return torch.stack((least, worth), dim=2).where(worth.isfinite()[:, :, None], torch.nan)


def decode_reference_(kept: Codes, width: int, out: Tensor) -> None:
    """Computes `decode` in plain torch."""
    rows, columns = out.shape
    for part in row_portions(rows, columns):
        least, worth = kept.ranges[part].unsqueeze(3).unbind(2)
        numbers = _in_groups(kept.codes[part], width).float().mul_(worth).add_(least)
        out[part] = numbers.flatten(1)[:, :columns]


def _in_groups(x_NC: Tensor, width: int) -> Tensor:
    """(N, J, W), the last group filled up with its last number, which changes no range."""
    missing = -x_NC.size(1) % width
    filled = torch.cat((x_NC, x_NC[:, -1:].expand(-1, missing)), dim=1) if missing else x_NC
    return filled.unflatten(1, (-1, width))


def _uniform(shape: torch.Size, groups: Groups, key: int, tokens: Tensor) -> Tensor:
    """u (N, J, W) of these tokens."""
    rows, count, width = shape
    calls = -(-width // A_CALL)
    numbers = (groups.first + torch.arange(count, device=tokens.device)) // groups.repeat
    places = (tokens[:, None] * groups.count + numbers) * calls
    counters = places[:, :, None] + torch.arange(calls, device=tokens.device)
    words = torch.stack(philox_words(key, counters.flatten()), dim=1)
    halves = torch.stack((words & 0xFFFF, words >> BITS), dim=2)
    return halves.view(rows, count, calls * A_CALL)[:, :, :width].float().mul_(2.0**-BITS)
