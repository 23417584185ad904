"""The numba form of `rowwise.kernels.adamw8bit`; the formula stands there. Every operand is read and written once."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rowwise.kernels.adamw_numba import adamw, adamw_rates
from rowwise.kernels.blockwise import BLOCK, blocks_per_row
from rowwise.kernels.blockwise_numba import books, decode
from rowwise.kernels.host import Piece, block_pieces, over_threads
from rowwise.kernels.host_numba import arrays, inlined, kernel, larger, load, number, numbers
from rowwise.kernels.moment_pair import Moment
from rowwise.kernels.moment_pair_numba import encode_pair
from rowwise.kernels.moments import Rounding
from rowwise.kernels.rounding_numba import WORDS, store

NOTHING = np.float32(0)


@inlined
def step_block(x, g, m, v, ratio, rates, n):
    """Takes the step on one block, and returns the largest |m| / sqrt(v) and the largest v. m counts as 0 where v is."""
    most = top = np.int32(0)
    for j in range(n):
        x[j], m[j], v[j] = adamw(x[j], g[j], m[j] if v[j] != NOTHING else NOTHING, v[j], rates)
        ratio[j] = abs(m[j]) / np.sqrt(v[j]) if v[j] != NOTHING else NOTHING
        most, top = larger(most, ratio[j]), larger(top, v[j])
    return number(most), number(top)


@kernel
def adamw8bit_kernel(param, grad, first, second, books, columns, per_row, begin, end, rates, key, start):
    x, g, m = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    v, ratio, limit = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    keys, words = np.empty(BLOCK, np.int32), np.empty(WORDS, np.uint32)
    for block in range(begin, end):
        row = block // per_row
        column = (block - row * per_row) * BLOCK
        place, n = row * columns + column, min(BLOCK, columns - column)
        codes = first[0][place : place + n], second[0][place : place + n]
        decode(codes[0], first[1][block], books[0][0], m, n)
        decode(codes[1], second[1][block], books[1][0], v, n)
        load(grad, place, g, n)
        load(param, place, x, n)
        most, top = step_block(x, g, m, v, ratio, rates, n)
        store(x, param, place, key, start, words, n)
        first[1][block] = encode_pair(m, v, ratio, most, top, codes, books, (limit, keys), n)
        second[1][block] = top


def adamw8bit_numba_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    rates = adamw_rates(step, lr, beta1, beta2, eps, weight_decay)
    both = books(True), books(False)

    def run(piece: Piece) -> None:
        i, begin, end = piece
        n, (key, start) = params[i].size(1), rounding[i] if rounding else (0, 0)
        adamw8bit_kernel(
            numbers(params[i]), numbers(grads[i]), arrays(exp_avgs[i]), arrays(exp_avg_sqs[i]), both, n, blocks_per_row(n),
            begin, end, rates, np.uint64(key), np.uint64(start),
        )  # fmt: skip

    over_threads(run, block_pieces(params))
