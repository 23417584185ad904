"""The Triton form of `rowwise.kernels.lion8bit`; the formula stands there. One launch a parameter."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.blockwise import BLOCK, blocks_per_row, code_book, code_table
from rowwise.kernels.blockwise_triton import BLOCKS, block_places, decode, encode, programs
from rowwise.kernels.moment_pair import Moment
from rowwise.kernels.moments import Rounding
from rowwise.kernels.philox_triton import signed_64
from rowwise.kernels.rounding_triton import WORDS, store_number


@triton.jit
def lion8bit_kernel(
    param,
    grad,
    codes,
    absmax,
    book,
    table,
    rows,
    columns,
    per_row,
    keep,  # 1 - lr wd
    lr,
    beta1_rest,  # 1 - b1
    beta2_rest,  # 1 - b2
    key,
    start,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block, first, place, exists, inside = block_places(rows, columns, per_row, BLOCKS, WIDTH)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    m = decode(codes, absmax, book, block, place, exists, inside)
    direction = m + beta1_rest * (g - m)
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
    x = tl.load(param + place, mask=inside, other=0.0).to(tl.float32)
    x = keep * x - lr * sign
    store_number(param, place, x, inside, key, start + first, WIDTH, ALIGNED)
    encode(m + beta2_rest * (g - m), codes, absmax, table, block, place, exists, inside)


def lion8bit_triton_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    for i, (p, g, avg) in enumerate(zip(params, grads, exp_avgs, strict=True)):
        if not p.numel():
            continue
        key, start = rounding[i] if rounding else (0, 0)
        book, table = code_book(True, p.device), code_table(True, p.device)
        (m, n), signed_key = p.shape, signed_64(key)
        scalars = (1 - lr * weight_decay, lr, 1 - beta1, 1 - beta2)
        aligned = start % WORDS == 0 and n % WORDS == 0
        lion8bit_kernel[programs(p)](
            p, g, *avg, book, table, m, n, blocks_per_row(n), *scalars, signed_key, start,
            BLOCKS=BLOCKS, WIDTH=BLOCK, ALIGNED=aligned,
        )  # fmt: skip
