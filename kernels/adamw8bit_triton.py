"""The Triton form of `rowwise.kernels.adamw8bit`; the formula stands there. One launch a parameter."""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks_per_row, code_book, code_table
from rowwise.kernels.blockwise_triton import BLOCKS, block_places, programs
from rowwise.kernels.moment_pair import Moment
from rowwise.kernels.moment_pair_triton import decode_pair, encode_pair
from rowwise.kernels.moments import Rounding
from rowwise.kernels.philox_triton import signed_64
from rowwise.kernels.rounding_triton import WORDS, store_number


@triton.jit
def adamw8bit_kernel(
    param,
    grad,
    avg_codes,
    avg_absmax,
    sq_codes,
    sq_absmax,
    avg_book,
    avg_table,
    sq_book,
    sq_table,
    rows,
    columns,
    per_row,
    keep,  # 1 - lr wd
    beta1_rest,  # 1 - b1
    beta2,
    beta2_rest,  # 1 - b2
    rate,  # lr sqrt(1 - b2^t) / (1 - b1^t)
    eps,  # eps sqrt(1 - b2^t)
    key,
    start,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block, first, place, exists, inside = block_places(rows, columns, per_row, BLOCKS, WIDTH)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    m, v = decode_pair(
        avg_codes, avg_absmax, sq_codes, sq_absmax, avg_book, sq_book, block, place, exists, inside
    )  # fmt: skip
    m += beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * g * g
    x = tl.load(param + place, mask=inside, other=0.0).to(tl.float32)
    x = keep * x - rate * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    store_number(param, place, x, inside, key, start + first, WIDTH, ALIGNED)
    encode_pair(
        m, v, avg_codes, avg_absmax, sq_codes, sq_absmax, avg_book, avg_table, sq_book, sq_table,
        block, place, exists, inside
    )  # fmt: skip


def adamw8bit_triton_(
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
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)
    for i, (p, g, avg, sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if not p.numel():
            continue
        key, start = rounding[i] if rounding else (0, 0)
        books = [make(signed, p.device) for signed in (True, False) for make in (code_book, code_table)]
        (m, n), signed_key = p.shape, signed_64(key)
        scalars = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, rate, eps * correction)
        aligned = start % WORDS == 0 and n % WORDS == 0
        adamw8bit_kernel[programs(p)](
            p, g, *avg, *sq, *books, m, n, blocks_per_row(n), *scalars, signed_key, start,
            BLOCKS=BLOCKS, WIDTH=BLOCK, ALIGNED=aligned,
        )  # fmt: skip
