"""Rows scaled by a quotient of norms: against the formula, in every dtype and shape, Triton as torch. (Law 1.)"""

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.row_scale import scale_rows, scale_rows_reference

SHAPES = [
    (0, 4, 300),
    (1, 1, 1),
    (3, 5, 1),
    (1, 16, 255),
    (2, 7, 256),
    (5, 128, 257),
    (2, 300, 704),
    (1, 1200, 1000),
    (2, 3, 2500),
]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6}


def operands(m: int, r: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(m + r + n)
    numerator, denominator, x = (torch.randn(m, width, dtype=torch.float64).to(dtype) for width in (r, r, n))
    if m > 1:
        denominator[1] = 0
    return numerator, denominator, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape, dtype):
    numerator, denominator, x = operands(*shape, dtype)
    y, squares = scale_rows(numerator, denominator, x)
    top, bottom = (torch.linalg.vector_norm(t.double(), dim=1, keepdim=True) for t in (numerator, denominator))
    expected = torch.where(bottom > 0, top / bottom, 0.0) * x.double()
    assert y.dtype == squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert y.shape == x.shape and squares.shape == ()
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(squares.double(), expected.square().sum(), rtol=2 * TOLERANCE[dtype], atol=0)
    if shape[0] > 1:
        assert (y[1] == 0).all()


def test_squares_of_many_rows_keep_their_digits():
    torch.manual_seed(0)
    numerator, denominator, x = torch.randn(3000, 4), torch.randn(3000, 4), torch.randn(3000, 700)
    y, squares = scale_rows(numerator, denominator, x)
    torch.testing.assert_close(squares.double(), y.double().square().sum(), rtol=1e-6, atol=0)


def test_rows_do_not_know_of_one_another():
    numerator, denominator, x = operands(9, 16, 300, torch.float32)
    whole, _ = scale_rows(numerator, denominator, x)
    for rows in (slice(0, 4), slice(4, 9), slice(5, 5)):
        assert torch.equal(scale_rows(numerator[rows], denominator[rows], x[rows])[0], whole[rows])


def agree():
    from rowwise.kernels.row_scale_triton import scale_rows_triton

    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            ours, reference = (form(*operands(*shape, dtype)) for form in (scale_rows_triton, scale_rows_reference))
            torch.testing.assert_close(ours[0], reference[0], rtol=2e-6, atol=0)
            torch.testing.assert_close(ours[1], reference[1], rtol=4e-6, atol=0)


def test_triton_agrees_with_torch():
    interpreted("test_kernels_row_scale", "agree")
