"""The numba form of `rowwise.kernels.rounding`; the formula stands there."""

import numpy as np
from llvmlite import ir
from numba import types
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK
from rowwise.kernels.host import Piece, flat_pieces, over_threads
from rowwise.kernels.host_numba import INT, in_registers, inlined, kernel, numbers

LOW = np.uint64(0xFFFFFFFF)
FIRST, SECOND = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # Philox's multipliers, and by how much its keys grow
GROWTH, OTHER_GROWTH = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
ZERO, ONE, TWO, THREE, HALF = (np.uint64(x) for x in (0, 1, 2, 3, 32))
WORDS = BLOCK + 8  # of the calls that a block may need


@in_registers(types.uint16, types.float32, types.uint32)
def rounded(emit, x, word):
    """The bits of x as bfloat16, with the lower 16 of `word` added below what is kept."""
    bits, random = emit.bitcast(x, INT), emit.and_(word, INT(0xFFFF))
    magnitude = emit.and_(bits, INT(0x7FFFFFFF))
    random = emit.select(emit.icmp_signed(">", magnitude, INT(0x7F7F0000)), INT(0x8000), random)  # there, to nearest
    quiet = emit.or_(bits, INT(0x400000))
    bits = emit.select(emit.icmp_signed(">", magnitude, INT(0x7F800000)), quiet, emit.add(bits, random))
    return emit.trunc(emit.lshr(bits, INT(16)), ir.IntType(16))


@inlined
def draw_words(key, first, count, words):
    """Fills `words` with those of the calls that serve elements [first, first + count); returns which is the first's."""
    begin, skipped = first >> np.uint64(2), first & THREE
    calls = (np.int64(skipped) + count + 3) >> 2
    for i in range(calls):
        counter = begin + np.uint64(i)
        c0, c1, c2, c3 = counter & LOW, counter >> HALF, ZERO, ZERO
        k0, k1 = key & LOW, key >> HALF
        for _ in range(10):
            a, b = c0 * FIRST, c2 * SECOND
            c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & LOW, (a >> HALF) ^ c3 ^ k1, a & LOW
            k0, k1 = (k0 + GROWTH) & LOW, (k1 + OTHER_GROWTH) & LOW
        place = np.uint64(i) << np.uint64(2)
        words[place], words[place | ONE] = c0, c1
        words[place | TWO], words[place | THREE] = c2, c3
    return np.int64(skipped)


@inlined
def store(x, target, first, key, start, words, n):
    """Writes the first n of x from `first` on: as they are, or rounded with the bits of elements [start + first, ...)."""
    wide, narrow = target
    if wide.size:
        part = wide[first : first + n]
        for j in range(n):
            part[j] = x[j]
    else:
        skipped = draw_words(key, start + np.uint64(first), n, words)
        random, half = words[skipped : skipped + n], narrow[first : first + n]
        for j in range(n):
            half[j] = rounded(x[j], random[j])


@kernel
def round_kernel(x, target, key, start, first, last):
    words = np.empty(WORDS, np.uint32)
    for begin in range(first, last, BLOCK):
        store(x[begin:last], target, begin, key, start, words, min(BLOCK, last - begin))


def round_numba_(x: Tensor, out: Tensor, key: int, start: int) -> None:
    source, target = numbers(x)[0], numbers(out)

    def run(piece: Piece) -> None:
        _, first, last = piece
        round_kernel(source, target, np.uint64(key), np.uint64(start), first, last)

    over_threads(run, flat_pieces([x]))
