"""The Triton form of `rowwise.kernels.condensed`; the formula stands there. A program has some rows of y^T and some
vectors, reads its values and columns once, and of x^T whole runs of vectors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.condensed import Condensed

PRODUCTS = 4096  # of a program at once
ROWS = 4


@triton.jit
def condensed_linear_kernel(
    xt,
    values,
    columns,
    rows,
    out,
    live,
    k,
    batch,
    ABLATED: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Writes ROWS rows of y^T (out, batch) for BATCH vectors: sums in a fixed order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    vector = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    sums = tl.zeros([ROWS, BATCH], tl.float32)
    for i in range(STEPS):
        place = i * WIDTH + tl.arange(0, WIDTH)
        inside = (row < live)[:, None] & (place < k)[None, :]
        entry = row.to(tl.int64)[:, None] * k + place[None, :]
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(
            xt + column[:, :, None] * batch + vector[None, None, :],
            mask=inside[:, :, None] & (vector < batch)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        sums += tl.sum(value[:, :, None] * x, axis=1)
    target = tl.load(rows + row, mask=row < live, other=0) if ABLATED else row
    y = out + target.to(tl.int64)[:, None] * batch + vector[None, :]
    tl.store(y, sums, mask=(row < live)[:, None] & (vector < batch)[None, :])


def condensed_linear_triton(x: Tensor, c: Condensed) -> Tensor:
    """Multiplies x (B, in) by W^T, to (B, out), laid out as (out, B)."""
    batch, (live, k) = len(x), c.values.shape
    width_of_batch = min(64, triton.next_power_of_2(batch))
    width = min(triton.next_power_of_2(k), PRODUCTS // (ROWS * width_of_batch))
    out = (torch.empty if c.rows is None else torch.zeros)(c.shape[0], batch, dtype=x.dtype, device=x.device)
    condensed_linear_kernel[(triton.cdiv(live, ROWS), triton.cdiv(batch, width_of_batch))](
        x.t().contiguous(),
        c.values,
        c.columns,
        c.columns if c.rows is None else c.rows,
        out,
        live,
        k,
        batch,
        ABLATED=c.rows is not None,
        STEPS=triton.cdiv(k, width),
        ROWS=ROWS,
        WIDTH=width,
        BATCH=width_of_batch,
    )
    return out.t()
