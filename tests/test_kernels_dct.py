"""The cosine transform: against the dense matrix in float64, orthonormal, accurate at any width, Triton as torch. (Law 1.)"""

import itertools
import math

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.dct import column_squares, column_squares_reference, dct_columns, dct_columns_reference

CPU = torch.device("cpu")
WIDTHS = [1, 2, 3, 4, 5, 64, 255, 256, 257, 704, 1000]


def dense(n: int) -> torch.Tensor:
    """D as its definition says it, in float64."""
    j, k = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    d = (math.pi * (2 * j + 1) * k / (2 * n)).cos() * math.sqrt(2 / n)
    d[:, 0] = math.sqrt(1 / n)
    return d


@pytest.mark.parametrize("n", WIDTHS)
def test_columns_are_those_of_the_dense_matrix_and_orthonormal(n):
    d = dct_columns(n, torch.arange(n), torch.float64, CPU)
    torch.testing.assert_close(d, dense(n), rtol=0, atol=1e-12)
    torch.testing.assert_close(d.T @ d, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13 * n)
    for dtype, tolerance in ((torch.float32, 2e-7), (torch.bfloat16, 4e-3)):
        some = torch.tensor([n - 1, 0, n // 2, n // 2])
        columns = dct_columns(n, some, dtype, CPU)
        assert columns.shape == (n, 4) and columns.dtype == dtype
        torch.testing.assert_close(
            columns.double() / math.sqrt(2 / n), d[:, some] / math.sqrt(2 / n), rtol=0, atol=tolerance
        )
    assert dct_columns(n, torch.arange(0), torch.float32, CPU).shape == (n, 0)


def test_float32_stays_accurate_at_large_widths():
    n, columns = 65536, torch.tensor([0, 1, 777, 32768, 65535])
    single, double = (dct_columns(n, columns, dtype, CPU) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.double() / math.sqrt(2 / n), double / math.sqrt(2 / n), rtol=0, atol=2e-7)
    torch.testing.assert_close(double.T @ double, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDTHS)
def test_squares_are_those_of_the_dense_product(n):
    torch.manual_seed(n)
    for m in (0, 1, 3, 70):
        g = torch.randn(m, n, dtype=torch.float64)
        expected = (g @ dense(n)).square().sum(0)
        torch.testing.assert_close(column_squares(g), expected, rtol=1e-10, atol=1e-11)
        assert column_squares(g).shape == (n,)
        for dtype in (torch.float32, torch.bfloat16):
            squares, expected = column_squares(g.to(dtype)), (g.to(dtype).double() @ dense(n)).square().sum(0)
            assert squares.dtype == torch.float32
            torch.testing.assert_close(squares.double(), expected, rtol=3e-5, atol=1e-6)


def test_squares_add_up_over_rows():
    """Parseval: the rotation keeps the norm; and ranks may add their results."""
    g = torch.randn(100, 704, dtype=torch.float64)
    squares = column_squares(g)
    torch.testing.assert_close(squares.sum(), g.square().sum())
    torch.testing.assert_close(column_squares(g[:37]) + column_squares(g[37:]), squares)


def agree():
    from rowwise.kernels.dct_triton import column_squares_triton, dct_columns_triton

    for n in (1, 2, 255, 256, 257):
        columns = torch.tensor([n - 1, 0, n // 3]).clamp_min(0)
        for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, 8e-3)):
            ours, reference = (f(n, columns, dtype, CPU) for f in (dct_columns_triton, dct_columns_reference))
            assert ours.shape == reference.shape and ours.dtype == dtype
            scale = math.sqrt(2 / n)
            torch.testing.assert_close(ours.float() / scale, reference.float() / scale, rtol=0, atol=tolerance)
    sizes = [(0, 5), (1, 1), (1, 255), (130, 65), (3, 256), (2, 257), (2, 384), (1, 520)]
    for (m, n), dtype in zip(sizes, itertools.cycle((torch.float32, torch.bfloat16)), strict=False):
        g = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(dtype)
        torch.testing.assert_close(column_squares_triton(g), column_squares_reference(g), rtol=3e-5, atol=1e-6)


def test_triton_agrees_with_torch():
    interpreted("test_kernels_dct", "agree")
