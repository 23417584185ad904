"""The numba form of `rowwise.kernels.lion8bit`; the formula stands there. Every operand is read and written once."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks_per_row
from rowwise.kernels.blockwise_numba import books, decode, encode
from rowwise.kernels.host import Piece, block_pieces, over_threads
from rowwise.kernels.host_numba import arrays, inlined, kernel, larger, load, number, numbers
from rowwise.kernels.lion_numba import lion, lion_rates
from rowwise.kernels.moment_pair import Moment
from rowwise.kernels.moments import Rounding
from rowwise.kernels.rounding_numba import WORDS, store


@inlined
def step_block(x, g, m, rates, n):
    """Takes the step on one block, and returns the largest |m|."""
    most = np.int32(0)
    for j in range(n):
        x[j], m[j] = lion(x[j], g[j], m[j], rates)
        most = larger(most, m[j])
    return number(most)


@kernel
def lion8bit_kernel(param, grad, moment, book, table, columns, per_row, begin, end, rates, key, start):
    x, g, m = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    keys, words = np.empty(BLOCK, np.int32), np.empty(WORDS, np.uint32)
    for block in range(begin, end):
        row = block // per_row
        column = (block - row * per_row) * BLOCK
        place, n = row * columns + column, min(BLOCK, columns - column)
        codes = moment[0][place : place + n]
        decode(codes, moment[1][block], book, m, n)
        load(grad, place, g, n)
        load(param, place, x, n)
        top = step_block(x, g, m, rates, n)
        store(x, param, place, key, start, words, n)
        encode(m, top, table, codes, keys, n)
        moment[1][block] = top


def lion8bit_numba_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    rates = lion_rates(lr, beta1, beta2, weight_decay)
    book, table = books(True)

    def run(piece: Piece) -> None:
        i, begin, end = piece
        n, (key, start) = params[i].size(1), rounding[i] if rounding else (0, 0)
        lion8bit_kernel(
            numbers(params[i]), numbers(grads[i]), arrays(exp_avgs[i]), book, table, n, blocks_per_row(n), begin, end,
            rates, np.uint64(key), np.uint64(start),
        )  # fmt: skip

    over_threads(run, block_pieces(params))
