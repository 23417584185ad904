"""Rows scaled by a quotient of row norms: what Fira and APOLLO do with the gradient.

Fira (Chen et al., *Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?*) and APOLLO (Zhu et
al., *APOLLO: SGD-like Memory, AdamW-level Performance*) run Adam on a low-rank gradient R (m, r), which gives N (m, r),
and let what is not in R learn as fast as Adam changed R, row by row (in Fira x is G - R Q^T, in APOLLO it is G):

    y_i = (|N_i| / |R_i|) x_i          0 where |R_i| = 0
    squares = sum over i of |y_i|^2    for the norm-growth limiter

Row-local: a rank needs its own rows alone; its `squares` is a summand of the tensor's.
"""

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import row_portions
from rowwise.kernels.wide import wide_dtype


def scale_rows(numerator: Tensor, denominator: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes y (m, n) and `squares` () from numerator N and denominator R (m, r) and x (m, n), all contiguous; m may be 0.

    Float64 x is computed and returned in float64, float32 and bfloat16 in float32: y is part of an update that is
    scaled further. A row whose |R_i|^2 is too small for that dtype counts as 0. Communicates nothing.
    """
    if x.dtype != torch.float64 and use_triton(x.device):
        from rowwise.kernels.row_scale_triton import scale_rows_triton

        return scale_rows_triton(numerator, denominator, x)
    return scale_rows_reference(numerator, denominator, x)


def scale_rows_reference(numerator: Tensor, denominator: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `scale_rows` in plain torch."""
    y = torch.empty_like(x, dtype=wide_dtype(x.dtype))
    squares = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in row_portions(*x.shape):
        top, bottom = (_norms(low_rank[rows], y.dtype) for low_rank in (numerator, denominator))
        torch.mul(x[rows], torch.where(bottom > 0, top / bottom, 0.0)[:, None], out=y[rows])
        squares += torch.dot(y[rows].view(-1), y[rows].view(-1))
    return y, squares.to(y.dtype)


def _norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).square().sum(1).sqrt()
