"""8-bit codes: the book against the paper, the codes against a search through all of them, Triton against torch. (Law 1.)"""

import hashlib

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.blockwise import (
    blocks_per_row,
    code_book,
    dequantise,
    midpoints,
    quantise,
    quantise_,
    quantise_reference_,
)

SHAPES = [(0, 300), (3, 1), (1, 255), (1, 256), (5, 257), (2, 704), (3, 1000), (9, 1024)]


def nearest(z: torch.Tensor, signed: bool) -> torch.Tensor:
    """By search: the first of the codes at the smallest distance, in float64 (exact for float32 z)."""
    return (z.double().unsqueeze(-1) - code_book(signed).double()).abs().argmin(-1)


def by_search(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise` as the paper says it, a block at a time."""
    x = x if x.dtype == torch.float64 else x.float()
    blocks = x.split(256, dim=1)
    absmax = [block.abs().amax(1, keepdim=True).float() for block in blocks]
    z = [torch.where(top > 0, block / top, 0.0) for block, top in zip(blocks, absmax, strict=True)]
    return nearest(torch.cat(z, 1), signed).to(torch.uint8), torch.cat(absmax, 1)


@pytest.mark.parametrize("signed", [True, False])
def test_the_book_is_the_papers(signed):
    exact = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        decade = [10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        exact += decade + ([-number for number in decade] if signed else [])
    assert len(exact) == 256
    torch.testing.assert_close(code_book(signed).double(), torch.tensor(sorted(exact)).double(), rtol=2e-7, atol=0)
    assert (code_book(signed).diff() > 0).all()


@pytest.mark.parametrize(("signed", "digest"), [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")])
def test_the_book_is_bitsandbytes_to_the_last_bit(signed, digest):
    """SHA-256 of create_dynamic_map(signed) of bitsandbytes 0.50.2, so that codes can be exchanged with it."""
    assert hashlib.sha256(code_book(signed).numpy().tobytes()).hexdigest().startswith(digest)


def hard_numbers(signed: bool) -> torch.Tensor:
    """Numbers in [-1, 1] that a quantiser gets wrong first, (1, n): codes, midpoints and their neighbours."""
    book, middles = code_book(signed), midpoints(signed).float()
    points = torch.cat([book, middles])
    up, down = points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0))
    decades = 10 ** torch.empty(20_000).uniform_(-12, 0, generator=torch.Generator().manual_seed(0))
    tiny = torch.tensor([2.0**-149, 2.0**-126, 1e-40, 0.0, -0.0])
    z = torch.cat([points, up, down, decades, -decades, tiny, -tiny]).clamp(-1, 1)
    return (z if signed else z.abs())[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_and_a_tie_is_the_lower_one(signed, dtype):
    z = hard_numbers(signed).to(dtype)
    if dtype == torch.float64:  # where every midpoint is exact
        z = torch.cat([z, midpoints(signed)[None]], dim=1)
    rows = torch.cat([z, torch.ones_like(z)]).T.contiguous()  # each number beside a 1, in a block of its own
    codes, absmax = quantise(rows, signed)
    assert (absmax == 1).all()
    assert torch.equal(codes[:, 0].long(), nearest(z[0], signed))
    distance = (z[0].double()[:, None] - code_book(signed).double()).abs()
    ties = (distance == distance.min(1, keepdim=True).values).sum(1) == 2
    assert ties.sum() >= (255 if dtype == torch.float64 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_maxima_are_those_of_a_search(shape, signed, dtype):
    for scale in (1.0, 1e-42, 1e37, 0.0):
        x = torch.randn(shape, dtype=torch.float64) * scale * 10 ** torch.randn(shape)
        x = (x if signed else x.abs()).clamp(-1e38, 1e38).to(dtype)
        if dtype == torch.float64 and scale == 1e-42:
            continue  # their maxima have few bits in float32: see the next test
        codes, absmax = quantise(x, signed)
        expected_codes, expected_absmax = by_search(x, signed)
        assert torch.equal(absmax, expected_absmax) and absmax.shape == (shape[0], blocks_per_row(shape[1]))
        assert torch.equal(codes, expected_codes)
        assert (codes[x == 0] == code_book(signed).tolist().index(0)).all()


def test_float64_below_float32_vanishes():
    x = torch.tensor([[1e-300, -1e-301]], dtype=torch.float64)
    assert (dequantise(*quantise(x, True), True, torch.float64) == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_what_is_not_finite_shows_in_its_block_and_there_alone(bad):
    for dtype in (torch.float64, torch.float32):
        for signed in (True, False):
            x = torch.randn(2, 600, dtype=dtype)
            x[1, 300] = torch.tensor(bad, dtype=torch.float64).to(dtype)
            x = x if signed else x.abs()
            finite = dequantise(*quantise(x, signed), signed).isfinite()
            assert not finite[1, 256:512].any() and finite.sum() == 2 * 600 - 256


def error_bound(signed: bool) -> float:
    """The largest |x' - x| / a: half of the book's largest gap (0.0071 signed, 0.0036 unsigned).

    -1 has no code of its own, but is just as near to the lowest one. The arithmetic itself adds a few units in the
    last place of float32, and 2^-149 where x' is subnormal.
    """
    return (code_book(signed).double().diff().max() / 2).item()


def relative_error_bound(signed: bool, magnitude: float) -> float:
    """The largest |x' - x| / |x| over all |x| >= magnitude * a.

    Between neighbouring codes l < h of one sign the relative error is largest at their midpoint: (h - l) / (h + l).
    Decade i has 4.5 / 2^i (signed) or 4.5 / 2^(i+1) at its lower end: 7 % or 3.5 % in [0.1, 1], and twice that with
    every decade further down. Below 1e-7 everything becomes 0: the bound is 1.
    """
    book = code_book(signed).double()
    book = book[book >= 0]
    low, high = book[:-1], book[1:]
    return ((high - low) / (high + low))[high > magnitude].max().item() if magnitude < 1 else error_bound(signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
def test_the_error_is_within_the_bounds(signed, dtype):
    z = hard_numbers(signed)[0].to(dtype)
    x = torch.cat([z, -z]) * 3.7 if signed else z * 3.7
    rows = torch.stack([x, torch.full_like(x, 3.7)], dim=1)
    error = (dequantise(*quantise(rows, signed), signed, dtype) - rows).abs()[:, 0] / 3.7
    assert error_bound(signed) * 0.999 < error.max() < error_bound(signed) * (1 + 1e-4)
    assert error_bound(signed) == pytest.approx(0.9 / (128 if signed else 256), rel=1e-4)
    for magnitude in (0.5, 0.1, 1e-2, 1e-4, 1e-6, 1e-9):
        held = x.abs() / 3.7 >= magnitude
        assert (error / (x.abs() / 3.7))[held].max() <= relative_error_bound(signed, magnitude) * (1 + 1e-4)
    assert 0.01 < relative_error_bound(signed, 0.1) < 0.071
    assert relative_error_bound(signed, 1e-9) == 1


def test_the_zero_below_zero_is_zero():
    for signed in (True, False):
        for dtype in (torch.float32, torch.float64):
            codes, absmax = quantise(torch.tensor([[-0.0, 0.0, 1.0]], dtype=dtype), signed)
            assert codes.tolist() == [[127 if signed else 0] * 2 + [255]] and absmax == 1


def test_rows_do_not_know_of_one_another():
    x = torch.randn(9, 1000)
    codes, absmax = quantise(x, True)
    for rows in (slice(0, 4), slice(4, 9), slice(8, 9)):
        some, maxima = torch.empty_like(codes[rows]), torch.empty_like(absmax[rows])
        quantise_(x[rows], some, maxima, True)
        assert torch.equal(some, codes[rows]) and torch.equal(maxima, absmax[rows])


def test_codes_survive_being_quantised_again():
    """A moment that does not change keeps its codes, as long as its largest number has the code of 1."""
    x = torch.randn(4, 700).abs()
    codes, absmax = quantise(x, False)
    again, maxima = quantise(dequantise(codes, absmax, False), False)
    assert torch.equal(codes, again) and torch.equal(absmax, maxima)


def agree():
    """In the interpreter: every code, maximum and number, to the last bit."""
    from rowwise.kernels.blockwise_triton import dequantise_triton_, quantise_triton_

    for shape in SHAPES[:-1]:
        # Triton's interpreter misreads subnormal bfloat16 numbers.
        for dtype, tiny in ((torch.float32, 1e-42), (torch.bfloat16, 1e-25)):
            for signed, scale in [(True, 1.0), (False, 1.0), (True, tiny), (True, 0.0), (False, 1e37)]:
                x = (torch.randn(shape) * 10 ** torch.randn(shape) * scale).clamp(-1e38, 1e38).to(dtype)
                x = x if signed else x.abs()
                blank = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape[0], blocks_per_row(shape[1]))
                ours, reference = [t.clone() for t in blank], [t.clone() for t in blank]
                quantise_triton_(x, *ours, signed)
                quantise_reference_(x, *reference, signed)
                assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])
                out = torch.empty_like(x)
                dequantise_triton_(*ours, signed, out)
                assert torch.equal(out, dequantise(*reference, signed, dtype))
    x = torch.randn(1, 300)
    x[0, 7] = torch.nan
    codes, absmax = torch.zeros(1, 300, dtype=torch.uint8), torch.zeros(1, 2)
    quantise_triton_(x, codes, absmax, True)
    assert absmax.isnan().tolist() == [[True, False]]
    for signed in (True, False):
        z = torch.cat([hard_numbers(signed), torch.ones(1, hard_numbers(signed).size(1))]).T[:900].contiguous()
        ours = torch.zeros(z.shape, dtype=torch.uint8), torch.zeros(len(z), 1)
        quantise_triton_(z, *ours, signed)
        assert torch.equal(ours[0], quantise(z, signed)[0])


def test_triton_and_torch_give_the_same_bits():
    interpreted("test_kernels_blockwise", "agree")
