"""The numba form of `rowwise.kernels.moment_pair`, of one block at a time; the formulas stand there."""

import numpy as np

from rowwise.kernels.blockwise_numba import decode, encode
from rowwise.kernels.host_numba import inlined, larger, number
from rowwise.kernels.moment_pair import LOSS, NEAR, SLACK, ZERO

NEAR_, LOSS_, SLACK_ = np.float32(NEAR), np.float32(LOSS), np.float32(SLACK)


@inlined
def encode_pair(m, v, ratio, most, top, codes, books, room, n):
    """Rounds the moments of a block into its codes; `most` is the largest `ratio` |m| / sqrt(v), `top` the largest v. Returns
    the largest |m|, to which its codes are relative. m is used up."""
    limit, keys = room
    book, table = books[1]
    encode(v, top, table, codes[1], keys, n)
    decode(codes[1], top, book, limit, n)
    _round_up(v, limit, ratio, most * NEAR_, codes[1], n)
    decode(codes[1], top, book, limit, n)
    largest = _hold_within(m, limit, most * SLACK_, n)
    book, table = books[0]
    encode(m, largest, table, codes[0], keys, n)
    decode(codes[0], largest, book, m, n)
    _round_down(m, limit, codes[0], n)
    return largest


@inlined
def _round_up(v, rounded, ratio, near, codes, n):
    """Takes the next code of v where it lost much of it and m is large beside it, or all of it."""
    for j in range(n):
        codes[j] += (rounded[j] * LOSS_ < v[j]) & ((ratio[j] > near) | (codes[j] == 0))


@inlined
def _hold_within(m, v, spread, n):
    """Holds m within +-spread sqrt(v), which v then is; returns the largest |m|."""
    most = np.int32(0)
    for j in range(n):
        v[j] = np.sqrt(v[j]) * spread
        x = v[j] if m[j] > v[j] else m[j]
        m[j] = -v[j] if x < -v[j] else x
        most = larger(most, m[j])
    return number(most)


@inlined
def _round_down(rounded, limit, codes, n):
    """Takes the next code of m towards 0 where it came to lie outside of what v allows."""
    for j in range(n):
        outside = abs(rounded[j]) > limit[j]
        codes[j] += (outside & (codes[j] < ZERO)) - (outside & (codes[j] > ZERO))
