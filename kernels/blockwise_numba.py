"""The numba form of `rowwise.kernels.blockwise`, of one block at a time; the formulas stand there."""

import numpy as np
from llvmlite import ir
from numba import types

from rowwise.kernels.blockwise import code_book, code_table
from rowwise.kernels.host_numba import INT, array, in_registers, inlined

SMALLEST = np.float32(2.0**-149)
INDEX = ir.IntType(64)
Book = tuple[np.ndarray, np.ndarray]


def books(signed: bool) -> Book:
    """Returns the numbers behind the codes, and the table that codes are looked up in."""
    return array(code_book(signed), np.float32), array(code_table(signed), np.int32)


@in_registers(types.int32, types.float32)
def ordered(emit, z):
    """The bits of z, inverted where it is negative."""
    bits = emit.bitcast(z, INT)
    return emit.xor(bits, emit.ashr(bits, INT(31)))


@in_registers(types.uintp, types.int32)
def interval(emit, key):
    """Where an ordered number is in the table."""
    return emit.zext(emit.lshr(key, INT(16)), INDEX)


@in_registers(types.uint8, types.int32, types.int32)
def code_at(emit, entry, key):
    """The code of an ordered number, by its entry in the table."""
    return emit.trunc(emit.lshr(emit.add(entry, key), INT(16)), ir.IntType(8))


@inlined
def decode(codes, top, book, x, n):
    """Reads the numbers behind a block's codes."""
    for j in range(n):
        x[j] = book[codes[j]] * top


@inlined
def encode(x, top, table, codes, keys, n):
    """Finds the nearest codes of a block whose largest number is `top`; `keys` is room for as many whole numbers."""
    divisor = max(top, SMALLEST)
    for j in range(n):
        keys[j] = ordered(x[j] / divisor)
    for j in range(n):
        codes[j] = code_at(table[interval(keys[j])], keys[j])
