"""The discrete cosine transform of gradient rows: which columns of it to keep, and those columns themselves.

D (n, n) is the orthonormal DCT-II matrix (*SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language
Models*), shared by all layers of one width:

    D[j, k] = sqrt((2 - [k = 0]) / n) cos(pi (2j + 1) k / (2n))          S = G D

A low-rank optimizer projects on the r columns of D whose coefficients S are largest over all rows, so it needs the
columns' sums of squares (n numbers to all-reduce) and, once they are chosen, the columns.

On CPUs the coefficients come from a real FFT (Makhoul, *A Fast Cosine Transform in One and Two Dimensions*, 1980): of
v = (x_0, x_2, x_4, ..., x_5, x_3, x_1), with W_k = exp(-i pi k / (2n)) FFT(v)_k,

    sum_j x_j cos(pi (2j + 1) k / (2n)) = Re W_k = -Im W_(n-k)

so that half of the spectrum holds all n coefficients. n may be any number.
"""

import math

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import row_portions
from rowwise.kernels.wide import wide_dtype


def dct_columns(n: int, columns: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Computes columns k of D for k in `columns` (r,) int64: (n, r), computed in float32 (float64 in float64).

    Whole numbers reduce the angle exactly, so that every entry is good to a few units in the last place of the
    largest one, whatever n. Communicates nothing.
    """
    if dtype != torch.float64 and use_triton(device):
        from rowwise.kernels.dct_triton import dct_columns_triton

        return dct_columns_triton(n, columns, dtype, device)
    return dct_columns_reference(n, columns, dtype, device)


def dct_columns_reference(n: int, columns: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Computes `dct_columns` in plain torch."""
    k = columns.to(device, non_blocking=True)
    out = torch.empty(n, len(k), dtype=dtype, device=device)
    scale = torch.where(k == 0, 1, 2).to(wide_dtype(dtype)).div(n).sqrt()
    for rows in row_portions(n, len(k)):
        odd = 2 * torch.arange(rows.start, rows.stop, device=device) + 1
        out[rows] = _cosine(odd[:, None] * k, n, scale.dtype) * scale
    return out


def _cosine(phase: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """cos(pi phase / (2n)) of int64 phases >= 0: as a sine of at most a quarter turn either way."""
    phase = phase % (4 * n)
    quarter = n - torch.minimum(phase, 4 * n - phase)
    return (quarter.to(dtype) * (math.pi / (2 * n))).sin()


def column_squares(g: Tensor) -> Tensor:
    """Sums S^2 over rows, S = G D, for local rows g (m, n): (n,) float32, float64 for float64. m may be 0.

    No more than a portion of S ever exists. Communicates nothing: add the results of all ranks.
    """
    if g.dtype != torch.float64 and use_triton(g.device):
        from rowwise.kernels.dct_triton import column_squares_triton

        return column_squares_triton(g)
    return column_squares_reference(g)


def column_squares_reference(g: Tensor) -> Tensor:
    """Computes `column_squares` by a real FFT of each row."""
    (m, n), dtype = g.shape, wide_dtype(g.dtype)
    half = n // 2 + 1
    angle = torch.arange(half, dtype=torch.float64, device=g.device) * (-math.pi / (2 * n))
    turn = torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex())
    squares = torch.zeros(half, 2, dtype=torch.float64, device=g.device)
    for rows in row_portions(m, n):
        x = g[rows].to(dtype)
        spectrum = torch.fft.rfft(torch.cat([x[:, ::2], x[:, 1::2].flip(1)], dim=1)).mul_(turn)
        squares += torch.view_as_real(spectrum).square_().sum(0)
    whole = torch.cat([squares[:, 0], squares[1 : n - half + 1, 1].flip(0)]) * (2 / n)
    whole[0] /= 2
    return whole.to(dtype)
