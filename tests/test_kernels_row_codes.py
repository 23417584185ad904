"""Codes of rows: the formula number by number, the authors' own beside it, unbiased, the same wherever rows are, Triton against torch.
(Law 1.)"""

import itertools
import math

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.philox import random_words, stream_key
from rowwise.kernels.row_codes import (
    WIDTH,
    Draws,
    blocks_of,
    code_bytes,
    decode_reference_,
    decode_rows_,
    encode_reference_,
    encode_rows_,
    rounded_rows,
)
from rowwise.kernels.wide import wide_dtype

KEY = stream_key(3, "reduce/blocks.0")
SHAPES = [(1, 3, 10), (2, 2, 256), (1, 4, 513), (3, 2, 257), (2, 1, 1), (1, 2, 768), (2, 3, 37)]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


def room(x, bits):
    """Empty codes and scales of x, with a gap between slices as messages have."""
    slices, rows, columns = x.shape
    codes = torch.zeros(slices, rows * code_bytes(columns, bits) + 5, dtype=torch.uint8)
    scales = torch.zeros(slices, rows * blocks_of(columns) + 3, dtype=wide_dtype(x.dtype))
    return codes[:, :-5].view(slices, rows, -1), scales[:, :-3].view(slices, rows, -1)


def there_and_back(x, bits=8, draws=None):
    codes, scales = room(x, bits)
    encode_rows_(x, codes, scales, bits, draws)
    out = torch.empty_like(x)
    decode_rows_(codes, scales, out, bits)
    return codes, scales, out


def by_hand(x, bits, draws):
    """The formula, in Python's own numbers: codes of (S, R, C)."""
    q = 2 ** (bits - 1) - 1
    words = None if draws is None else (random_words(*draws, x.numel(), x.device) & 0xFFFF).view_as(x)
    codes = torch.zeros(x.shape, dtype=torch.int64)
    for s, r in itertools.product(range(x.size(0)), range(x.size(1))):
        row = x[s, r].tolist()
        for c, number in enumerate(row):
            scale = max(map(abs, row[c // WIDTH * WIDTH :][:WIDTH])) / q
            y = number / scale
            up = draws is not None and (y - math.floor(y)) * 65536 > int(words[s, r, c]) + 0.5
            codes[s, r, c] = round(y) if draws is None else math.floor(y) + up
    return codes


def read(codes, columns, bits):
    numbers = codes.int() if bits == 8 else torch.stack((codes.int() % 16, codes.int() // 16), 3).flatten(2)
    return numbers[:, :, :columns] - 2 ** (bits - 1)


@pytest.mark.parametrize("draws", [None, Draws(KEY, 5)], ids=["nearest", "random"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_formula(shape, bits, draws):
    x = numbers(*shape, dtype=torch.float64)
    codes, scales, out = there_and_back(x, bits, draws)
    right = by_hand(x, bits, draws)
    assert torch.equal(read(codes, shape[2], bits).long(), right)
    spread = scales.repeat_interleave(WIDTH, 2)[:, :, : shape[2]]
    torch.testing.assert_close(out, right * spread, rtol=1e-15, atol=0)
    assert ((out - x).abs() <= spread * (0.5 if draws is None else 1.0) * (1 + 1e-12)).all()
    nearest = there_and_back(x.float(), bits, draws)[0]
    assert ((read(nearest, shape[2], bits) - right).abs() > 0).float().mean() < 0.01  # by float32's roundings


@pytest.mark.parametrize("bits", [8, 4])
def test_the_authors_codes_differ_by_one_at_most_and_lose_more_of_the_largest(bits):
    """DeepSpeed (quantization_utils.h, symmetric): scale = 2^bits / (2 max), codes rint(x scale) within -2^(bits-1) and
    2^(bits-1) - 1, and 1 / scale is kept."""
    x = numbers(1, 64, WIDTH).abs()
    codes, _, out = there_and_back(x, bits)
    scale = 2**bits / (2 * x.amax(2, keepdim=True))
    theirs = (x * scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (read(codes, WIDTH, bits) - theirs).abs().max() <= 1
    most = x.amax(2)
    assert ((theirs / scale).amax(2) <= most * (1 - 2.0 ** (1 - bits)) * 1.001).all()
    torch.testing.assert_close(out.amax(2), most)
    # Their scale is finer by q / (q + 1), which is what is given for it elsewhere.
    ratio = (out - x).square().mean() / (theirs / scale - x).square().mean()
    assert ratio < (1 + 1 / (2 ** (bits - 1) - 1)) ** 2 * 1.02


@pytest.mark.parametrize("bits", [8, 4])
def test_at_random_what_comes_back_is_unbiased(bits):
    """Of 20,000 draws of each of 200 numbers the mean is the number, to 5 standard errors, and so is the mean over numbers."""
    x, draws = numbers(1, 1, 200), 20_000
    _, scales, out = there_and_back(x.expand(1, draws, -1).contiguous(), bits, Draws(KEY, 1))
    error = out[0].double().mean(0) - x.flatten().double()
    scale = scales[0, 0, 0].double()
    fraction = (x.flatten().double() / scale) % 1
    deviation = scale * (fraction * (1 - fraction) / draws).sqrt()
    rounding = scale * 2.0**-16 + x.abs().max() * 2.0**-22  # of the bits drawn, and of float32
    assert (error.abs() <= 5 * deviation + rounding).all()
    assert abs(error.sum()) <= 5 * deviation.square().sum().sqrt() + 200 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_have_the_codes_that_they_have_within_the_whole(dtype):
    x = numbers(1, 7, 300, dtype=dtype)
    whole = there_and_back(x, 4, Draws(KEY, 6))
    for first, last in ((0, 1), (1, 4), (4, 7)):
        part = there_and_back(x[:, first:last], 4, Draws(KEY, 6 + first * 300))
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[:, first:last])
    assert torch.equal(torch.cat([rounded_rows(x[0, :3]), rounded_rows(x[0, 3:])]), rounded_rows(x[0]))


def test_zeros_stay_and_what_is_not_finite_says_so():
    x = numbers(1, 5, 300)
    x[0, 0], x[0, 1, :256], x[0, 2, 3], x[0, 3, 299], x[0, 4, 7] = 0, 1e-37, torch.nan, torch.inf, 0
    out = there_and_back(x)[2][0]
    assert not out[0].any() and not out[1, :256].any() and out[1, 256:].any() and out[4, 7] == 0
    assert out[2, :256].isnan().all() and out[2, 256:].isfinite().all()
    assert out[3, :256].isfinite().all() and out[3, 256:].isnan().all()


def test_what_is_added_is_added():
    x, start = numbers(2, 3, 300), numbers(2, 3, 300, seed=1)
    codes, scales, out = there_and_back(x, 4)
    total = start.clone()
    decode_rows_(codes, scales, total, 4, add=True)
    torch.testing.assert_close(total, start + out, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_gives_what_torch_gives(dtype):
    interpreted("test_kernels_row_codes", "triton_is_torch", dtype)


def triton_is_torch(dtype):
    from rowwise.kernels.row_codes_triton import decode_triton_, encode_triton_

    cases = list(itertools.product((8, 4), SHAPES[2:4] + SHAPES[6:], (None, Draws(KEY, 4), Draws(KEY, 7))))
    # In 16 bits, every two of bits, shape and draws in one of the dtypes.
    for bits, shape, draws in cases[
        {torch.bfloat16: 0, torch.float16: 1}.get(dtype, 0) :: 1 if dtype == torch.float32 else 2
    ]:
        x = numbers(*shape, dtype=dtype)
        if shape[2] > 256:
            x[0, 0, 3], x[-1, -1, 256:] = torch.nan, 0
        (codes, scales), (right, right_scales) = room(x, bits), room(x, bits)
        encode_triton_(x, codes, scales, bits, draws)
        encode_reference_(x, right, right_scales, bits, draws)
        assert torch.equal(scales.isnan(), right_scales.isnan()) and torch.equal(
            scales.nan_to_num(), right_scales.nan_to_num()
        )
        assert torch.equal(codes, right)
        for add in (False, True):
            out = numbers(*shape, dtype=dtype if not add else torch.float32, seed=2)
            right_out = out.clone()
            decode_triton_(codes, scales, out, bits, add)
            decode_reference_(codes, scales, right_out, bits, add)
            torch.testing.assert_close(out, right_out, rtol=0, atol=0, equal_nan=True)
