"""The numba form of `rowwise.kernels.adamw`, for bfloat16 parameters; the formula stands there."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK
from rowwise.kernels.host import Piece, flat_pieces, over_threads
from rowwise.kernels.host_numba import float32s, fma, inlined, kernel, lerp, load, numbers
from rowwise.kernels.rounding import Rounding
from rowwise.kernels.rounding_numba import WORDS, store


def adamw_rates(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[np.float32, ...]:
    """Computes what a step multiplies with, as torch's fused operator does."""
    rate, correction = -lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return float32s(1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, rate, correction, eps)


@inlined
def adamw(x, g, m, v, rates):
    """One number's step: the new x, m and v."""
    keep, beta1_rest, beta2, beta2_rest, rate, correction, eps = rates
    m = lerp(m, g, beta1_rest)
    v = fma(beta2_rest * g, g, v * beta2)
    return x * keep + rate * m / (np.sqrt(v) / correction + eps), m, v


@inlined
def step_block(x, g, m, v, rates, n):
    for j in range(n):
        x[j], m[j], v[j] = adamw(x[j], g[j], m[j], v[j], rates)


@kernel
def adamw_kernel(param, grad, first, second, begin, end, rates, key, start):
    x, g, words = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(WORDS, np.uint32)
    for place in range(begin, end, BLOCK):
        n = min(BLOCK, end - place)
        load(grad, place, g, n)
        load(param, place, x, n)
        step_block(x, g, first[place : place + n], second[place : place + n], rates, n)
        store(x, param, place, key, start, words, n)


def adamw_numba_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    rates = adamw_rates(step, lr, beta1, beta2, eps, weight_decay)
    flat = [g.contiguous() for g in grads]

    def run(piece: Piece) -> None:
        i, begin, end = piece
        key, start = rounding[i] if rounding else (0, 0)
        m, v = numbers(exp_avgs[i])[0], numbers(exp_avg_sqs[i])[0]
        adamw_kernel(numbers(params[i]), numbers(flat[i]), m, v, begin, end, rates, np.uint64(key), np.uint64(start))

    over_threads(run, flat_pieces(params))
