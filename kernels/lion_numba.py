"""The numba form of `rowwise.kernels.lion`; the formula stands there. Every operand is read and written once."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK
from rowwise.kernels.host import Piece, flat_pieces, over_threads
from rowwise.kernels.host_numba import float32s, inlined, kernel, lerp, load, numbers
from rowwise.kernels.rounding import Rounding
from rowwise.kernels.rounding_numba import WORDS, store

NOTHING, ONE = np.float32(0), np.float32(1)


def lion_rates(lr: float, beta1: float, beta2: float, weight_decay: float) -> tuple[np.float32, ...]:
    """Computes what a step multiplies with, as torch's operators do."""
    return float32s(1 - lr * weight_decay, -lr, 1 - beta1, 1 - beta2)


@inlined
def lion(x, g, m, rates):
    """One number's step: the new x and m."""
    keep, rate, beta1_rest, beta2_rest = rates
    mixture = lerp(m, g, beta1_rest)
    sign = (ONE if mixture > NOTHING else NOTHING) - (ONE if mixture < NOTHING else NOTHING)
    return x * keep + rate * sign, lerp(m, g, beta2_rest)


@inlined
def step_block(x, g, m, rates, n):
    for j in range(n):
        x[j], m[j] = lion(x[j], g[j], m[j], rates)


@kernel
def lion_kernel(param, grad, moment, begin, end, rates, key, start):
    x, g, words = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(WORDS, np.uint32)
    for place in range(begin, end, BLOCK):
        n = min(BLOCK, end - place)
        load(grad, place, g, n)
        load(param, place, x, n)
        step_block(x, g, moment[place : place + n], rates, n)
        store(x, param, place, key, start, words, n)


def lion_numba_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    rates = lion_rates(lr, beta1, beta2, weight_decay)
    flat = [g.contiguous() for g in grads]

    def run(piece: Piece) -> None:
        i, begin, end = piece
        key, start = rounding[i] if rounding else (0, 0)
        m = numbers(exp_avgs[i])[0]
        lion_kernel(numbers(params[i]), numbers(flat[i]), m, begin, end, rates, np.uint64(key), np.uint64(start))

    over_threads(run, flat_pieces(params))
