"""Adam's two moments in 8 bits, rounded together, so that no rounding makes a step larger than its gradients do.

A step is m / sqrt(v). Rounded each on its own (`blockwise`), v > 0 may become 0 where m does not, and the step m / eps; and
far below the largest of a block codes are so sparse that m may gain and v lose a third. Here, with r = |m| / sqrt(v) and R
the largest r of the block, all before rounding,

    v' = the nearest code of v; the next above it where that is 0 and v is not, or where r > 9/10 R and v' < v / (1 + 1/64)
    m' = the nearest code of m held within +-R sqrt(v'); the next towards 0 where that lies outside

so |m'| / sqrt(v') <= R: rounding never raises the largest ratio of a block, and it is never above that which the
Cauchy-Schwarz inequality grants to Adam,

    m^2 / v <= (1 - b1)^2 / (1 - b2) sum over k < t of (b1^2 / b2)^k.

All other numbers have the codes of Dettmers et al.; their mean does not move. Rounding every v up would bound steps too, but
a v that decays by less than a gap at every step would never come down. m reads as 0 where v does: codes that were rounded
one by one hold such pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks, decode, dequantise, encode_
from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import row_portions

Moment = tuple[Tensor, Tensor]  # codes (m, n) uint8 and absmax (m, ceil(n / 256)) float32

NEAR = 0.9  # of R, above which v is not rounded down
LOSS = 1 + 2.0**-6  # by more than this factor
SLACK = 1 + 2.0**-16  # on R sqrt(v'): a pair that is exactly at its limit stays there, whatever the last bits
ZERO = 127  # the code of 0 in the signed book


def quantise_pair_(m: Tensor, v: Tensor, first: Moment, second: Moment) -> None:
    """Rounds the moments m and v >= 0, both (rows, n), float32 or float64, into `first` and `second`, in place. Local:
    communicates nothing."""
    if m.dtype != torch.float64 and use_triton(m.device):
        from rowwise.kernels.moment_pair_triton import quantise_pair_triton_

        quantise_pair_triton_(m, v, first, second)
    else:
        quantise_pair_reference_(m, v, first, second)


def quantise_pair_reference_(m: Tensor, v: Tensor, first: Moment, second: Moment) -> None:
    """Computes `quantise_pair_` in plain torch."""
    for rows in row_portions(*m.shape):
        states = [(codes[rows], absmax[rows]) for codes, absmax in (first, second)]
        encode_pair_((m[rows].clone(), v[rows].clone()), states)


def dequantise_pair(first: Moment, second: Moment, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Decodes the moments (m, v) behind their codes; m is 0 where v is."""
    m, v = dequantise(*first, True, dtype), dequantise(*second, False, dtype)
    return m.masked_fill_(v == 0, 0), v


def decode_pair(states: Sequence[Moment], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes `dequantise_pair` of one portion of rows in plain torch."""
    m, v = (decode(*state, signed, dtype) for state, signed in zip(states, (True, False), strict=True))
    return m.masked_fill_(v == 0, 0), v


def encode_pair_(numbers: Sequence[Tensor], states: Sequence[Moment]) -> None:
    """Rounds (m, v) of one portion of rows, float32 or float64, into their codes; both are used up."""
    (m, v), (first, second) = numbers, states
    ratio = m.abs().div_(_root(v)).masked_fill_(v == 0, 0)
    largest = torch.empty(second[1].shape, dtype=m.dtype, device=m.device)
    for block, top in blocks(ratio, largest):
        top.copy_(block.amax(-1, keepdim=True))
    _round_second_(v, ratio > _spread(largest * NEAR, m), second)
    limit = _root(decode(*second, False, m.dtype)).mul_(_spread(largest * SLACK, m))
    torch.fmin(m, limit, out=m)
    torch.fmax(m, -limit, out=m)
    encode_(m, *first, True)
    outside = decode(*first, True, limit.dtype).abs_() > limit
    codes = first[0]
    towards_zero = outside & (codes < ZERO), outside & (codes > ZERO)
    codes.add_(towards_zero[0]).sub_(towards_zero[1].to(codes.dtype))


def _round_second_(v: Tensor, near: Tensor, second: Moment) -> None:
    """Rounds v into `second`; upwards where it is `near` the largest ratio, or would be lost."""
    codes, absmax = second
    encode_(v.clone(), codes, absmax, False)
    short = decode(codes, absmax, False, v.dtype).mul_(LOSS) < v
    codes.add_(short & (near | (codes == 0)))


def _root(x: Tensor) -> Tensor:
    """The square root, rounded to the nearest as the other forms have it. torch's own of float32 is not on a CPU."""
    return x.to(torch.float64, copy=True).sqrt_().to(x.dtype)


def _spread(per_block: Tensor, like: Tensor) -> Tensor:
    """A number of each block (m, ceil(n / 256)) beside each of its elements: broadcasts with `like` (m, n)."""
    n = like.size(1)
    return per_block if n <= BLOCK else per_block.repeat_interleave(BLOCK, dim=1)[:, :n]
