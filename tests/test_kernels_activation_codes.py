"""8-bit codes of activations: the formula number by number, the paper's authors' rule, unbiased, the same wherever a token and
a head are, Triton against torch. (Law 1.)"""

import math

import pytest
import torch

from interpreter import interpreted
from rowwise.kernels.activation_codes import (
    Codes,
    Groups,
    channel_groups,
    code_bytes,
    decode,
    decode_reference_,
    encode,
    encode_reference_,
)
from rowwise.kernels.philox import philox_words, stream_key

KEY = stream_key(3, "activations/4/q")
SHAPES = [(3, 10, 10), (5, 30, 10), (2, 300, 256), (7, 256, 256), (4, 513, 256), (3, 64, 64), (2, 1, 1), (4, 37, 37)]


def numbers(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(3).add(0.7).to(dtype)


def groups_of(columns, width):
    return Groups(width, -(-columns // width))


def by_hand(x, width, count, first, repeat, tokens):
    """The formula, in Python's own numbers."""
    codes, calls = [], -(-width // 8)
    for row, token in zip(x.tolist(), tokens.tolist(), strict=True):
        for g in range(-(-len(row) // width)):
            group = row[g * width : (g + 1) * width]
            least, worth = min(group), (max(group) - min(group)) / 255
            counter = (token * count + (first + g) // repeat) * calls
            for j, number in enumerate(group):
                words = philox_words(KEY, torch.tensor([counter + j // 8]))
                half = int(words[j % 8 // 2]) >> (16 if j % 2 else 0) & 0xFFFF
                codes.append(math.floor((number - least) / worth + half / 65536) if worth else 0)
    return torch.tensor(codes).view(x.shape).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_codes_are_those_of_the_formula(rows, columns, width):
    x, tokens = numbers(rows, columns), torch.arange(rows) * 7 + 10**6
    kept = encode(x, groups_of(columns, width), KEY, tokens)
    right = by_hand(x.double(), width, -(-columns // width), 0, 1, tokens)
    off = (
        kept.codes.int() - right.int()
    ).abs()  # by float32's rounding a number may fall on the other side of an integer
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    spread = kept.ranges[:, :, 1].repeat_interleave(width, 1)[:, :columns]
    assert ((decode(kept, width, torch.float32) - x).abs() <= spread * 1.001 + 1e-6).all()


def test_given_their_ranges_the_authors_decode_the_same():
    """ziplab/Mesa keeps scale = 255 / (max - min) and shift = min, and gives back code / scale + shift."""
    x = numbers(6, 512)
    kept = encode(x, channel_groups(512), KEY, torch.arange(6))
    grouped = x.view(6, 2, 256)
    scale, shift = 255 / (grouped.amax(2, keepdim=True) - grouped.amin(2, keepdim=True)), grouped.amin(2, keepdim=True)
    theirs = kept.codes.view(6, 2, 256) / scale + shift
    torch.testing.assert_close(decode(kept, 256, torch.float32).view(6, 2, 256), theirs, rtol=1e-6, atol=1e-6)
    # Theirs is rint(max((x - shift) scale + noise - 0.5, 0)) with noise in (0, 1]: one of the two codes around.
    exact = (grouped - shift) * scale
    codes = kept.codes.view(6, 2, 256).float()
    assert ((codes >= exact.floor() - 1e-3) & (codes <= exact.ceil() + 1e-3)).all()


def test_what_comes_back_is_unbiased():
    """Of 10,000 draws of each of 200 numbers the mean is the number, to 5 standard errors, and so is the mean over numbers."""
    x, draws = numbers(1, 200), 10_000
    kept = encode(x.expand(draws, -1).contiguous(), channel_groups(200), KEY, torch.arange(draws) * 3)
    total = decode(kept, 200, torch.float32).double().sum(0)
    worth = (x.max() - x.min()).double() / 255
    inside = ((x.double() - x.min()) / worth).squeeze()
    fraction = inside - inside.floor()
    error = total / draws - x.squeeze().double()
    deviation = worth * (fraction * (1 - fraction) / draws).sqrt()
    rounding = worth * 2.0**-16 + x.abs().max() * 2.0**-22  # of u, and of float32
    assert (error.abs() <= 5 * deviation + rounding).all()
    assert abs(error.sum()) <= 5 * deviation.square().sum().sqrt() + 200 * rounding


def test_a_part_has_the_codes_of_the_whole():
    """Some tokens, some heads, and heads that are repeated for ranks: the same numbers get the same codes."""
    heads, size, rows = 6, 10, 12
    x, tokens = numbers(rows, heads * size), torch.arange(rows) + 55
    whole = encode(x, Groups(size, heads), KEY, tokens)
    some = torch.tensor([9, 2, 5])
    part = encode(x[some].contiguous(), Groups(size, heads), KEY, tokens[some])
    assert torch.equal(part.codes, whole.codes[some]) and torch.equal(part.ranges, whole.ranges[some])
    mine = encode(x[:, 2 * size : 5 * size].contiguous(), Groups(size, heads, first=2), KEY, tokens)
    assert torch.equal(mine.codes, whole.codes[:, 2 * size : 5 * size])
    keys = x[:, : 2 * size].contiguous()  # two key heads, each three times; a rank has the last three
    whole = encode(keys, Groups(size, 2), KEY, tokens)
    repeated = keys.view(rows, 2, size).repeat_interleave(3, 1)[:, 3:].flatten(1).contiguous()
    mine = encode(repeated, Groups(size, 2, first=3, repeat=3), KEY, tokens)
    assert torch.equal(mine.codes, whole.codes[:, size:].repeat(1, 3))
    other = encode(x, Groups(size, heads), KEY + 1, tokens)
    assert not torch.equal(other.codes, encode(x, Groups(size, heads), KEY, tokens).codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back_as_it_came(dtype):
    x = numbers(4, 300, dtype)
    kept = encode(x, channel_groups(300), KEY, torch.arange(4))
    back = decode(kept, 256, dtype)
    assert back.dtype == dtype and kept.codes.dtype == torch.uint8
    assert kept.codes.nbytes + kept.ranges.nbytes == 4 * code_bytes(300) == 4 * (300 + 2 * 8)
    error = (back.double() - x.double()).abs().max()
    assert error <= (x.double().max() - x.double().min()) / 255 * 1.01 + 2.0**-8 * x.double().abs().max() * (
        dtype in (torch.bfloat16, torch.float16)
    )


def odd_numbers(dtype=torch.float32):
    """A group of one number, of zeros, of numbers whose range rounds to nothing; with NaN and infinities; too wide a range."""
    tiny, huge = 1e-45, 3e38 if dtype != torch.float16 else 6e4
    rows = [[4.0] * 8, [0.0] * 8, [tiny] * 4 + [0.0] * 4, [math.nan] + [1.0] * 7, [math.inf, 1.0] * 4,
            [-math.inf, math.inf] * 4, [-huge, huge] * 4, [-1.0, 1.0] * 4]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


def test_odd_numbers():
    kept = encode(odd_numbers(), Groups(8, 1), KEY, torch.arange(8))
    back = decode(kept, 8, torch.float32)
    assert torch.equal(back[[0, 1]], odd_numbers()[[0, 1]]) and torch.equal(back[7], odd_numbers()[7])
    assert back[2].abs().max() <= 1e-44
    assert back[3:7].isnan().all() and not back[[0, 1, 2, 7]].isnan().any()


def check_triton():
    from rowwise.kernels.activation_codes_triton import decode_triton_, encode_triton_

    cases = [(numbers(r, c, dtype), Groups(w, -(-c // w) + more, more, 1 + more), w)
             for r, c, w in SHAPES for dtype, more in ((torch.float32, 0), (torch.bfloat16, 2))]  # fmt: skip
    cases += [(odd_numbers(dtype), Groups(8, 1), 8) for dtype in (torch.float32, torch.float16)]
    cases += [(numbers(5, 300, torch.float64), channel_groups(300), 256), (numbers(0, 40), channel_groups(40), 40)]
    for x, groups, width in cases:
        tokens = torch.arange(len(x)) * 3 + (1 << 33)
        shape = len(x), -(-x.size(1) // width), 2
        ours, theirs = (Codes(torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(shape)) for _ in range(2))
        encode_triton_(x, ours, groups, KEY, tokens)
        encode_reference_(x, theirs, groups, KEY, tokens)
        assert torch.equal(ours.codes, theirs.codes), (x.shape, x.dtype, width)
        torch.testing.assert_close(ours.ranges, theirs.ranges, rtol=0, atol=0, equal_nan=True)
        back, right = torch.empty_like(x), torch.empty_like(x)
        decode_triton_(ours, width, back)
        decode_reference_(theirs, width, right)
        torch.testing.assert_close(back, right, rtol=0, atol=0, equal_nan=True)
        # With one range for all tokens, narrower than most.
        one = torch.tensor([-1.0, 0.015]).expand(shape[1], 2) * torch.arange(shape[1])[:, None]
        ours, theirs = (
            Codes(torch.zeros_like(codes.codes), one.contiguous().expand(shape)) for codes in (ours, theirs)
        )
        encode_triton_(x, ours, groups, KEY, tokens, given=True)
        encode_reference_(x, theirs, groups, KEY, tokens, given=True)
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.ranges[:1], one[None][: len(x)])
        decode_triton_(ours, width, back)
        decode_reference_(theirs, width, right)
        assert torch.equal(back, right)


def test_triton_is_the_reference_to_the_last_bit():
    interpreted("test_kernels_activation_codes", "check_triton")
