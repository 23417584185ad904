"""Stochastic rounding: only the two neighbours, unbiased, the same wherever a row lives, Triton as torch. (Law 1.)"""

import pytest
import torch
from torch import Tensor

from interpreter import interpreted
from rowwise.kernels.philox import philox_words, stream_key
from rowwise.kernels.rounding import LARGEST, random_16, round_bf16_, round_reference_

CPU = torch.device("cpu")
KEY = stream_key(7, "blocks.0.attention.wq.weight")


def round_bf16(x: Tensor, key: int, start: int) -> Tensor:
    """`round_bf16_` into a tensor of its own."""
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_bf16_(x, out, key, start)
    return out


def bfloats(*bits: int) -> torch.Tensor:
    return (torch.tensor(bits, dtype=torch.int32) << 16).view(torch.float32)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


def test_the_random_bits_are_those_promised():
    for start, count in [(0, 9), (3, 1), (4, 4), (2**34 + 1, 70)]:
        expected = []
        for element in range(start, start + count):
            words = philox_words(KEY, torch.tensor([element // 4]))
            expected.append(int(words[element % 4]) & 0xFFFF)
        assert random_16(KEY, start, count, CPU).tolist() == expected


def test_the_random_bits_are_added_below_what_is_kept():
    x = torch.randn(5, 301) * 10 ** torch.randn(5, 301)
    random = random_16(KEY, 11, x.numel(), CPU).view(5, 301)
    expected = ((x.view(torch.int32).long() & 0xFFFFFFFF) + random) >> 16
    assert torch.equal(bits_of(round_bf16(x, KEY, 11)).long() & 0xFFFF, expected)


def test_only_the_two_neighbours_and_unbiased():
    """Over 4,000 keys the mean of every number is within five standard errors of the number."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(60), torch.tensor([1.0, 1 + 2.0**-9, -1 - 2.0**-16, 3e-39, 1e-41, 0.0])])
    draws = torch.stack([round_bf16(x, key, 5) for key in range(4000)]).double()
    below, above = bits_of_neighbours(x)
    assert ((draws == below) | (draws == above)).all()
    share = (x.double() - below) / (above - below)
    error = (draws.mean(0) - x.double()).abs() / (above - below)
    assert (error <= 5 * (share * (1 - share) / 4000).sqrt()).all()
    assert (draws != draws[0]).any(0)[:60].all()


def bits_of_neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers at or next to zero from x, and next away from zero, as float64."""
    toward_zero = x.view(torch.int32) & ~0xFFFF
    away = toward_zero + (1 << 16)
    return toward_zero.view(torch.float32).double(), away.view(torch.float32).double()


def test_bits_are_independent_of_one_another():
    random = random_16(KEY, 0, 200_000, CPU).double() / 65536 - 0.5
    assert abs(random.mean()) < 5 / (12 * 200_000) ** 0.5
    for lag in (1, 2, 3, 4, 768):
        assert abs((random[lag:] * random[:-lag]).mean()) < 5 / 12 / 200_000**0.5


def test_what_bfloat16_holds_stays():
    x = torch.randn(1000).bfloat16()
    assert torch.equal(round_bf16(x.float(), KEY, 0), x)


def test_the_edge_of_finite_numbers_is_that_of_rounding_to_nearest():
    largest = torch.tensor(LARGEST)
    steps = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
    beyond = (largest.view(torch.int32) + steps).view(torch.float32)
    below = bfloats(0x7F7E).view(torch.int32).add(0xFFFF).view(torch.float32)
    for x in (torch.cat([beyond, below]), -torch.cat([beyond, below])):
        for key in range(50):
            rounded = round_bf16(x, key, 0)
            assert torch.equal(rounded[:5], x[:5].bfloat16())
            assert rounded[5:].isfinite().all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0])
    special = torch.cat([special, torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)])
    for key in range(50):
        rounded = round_bf16(special, key, 0)
        assert rounded[:2].tolist() == [torch.inf, -torch.inf]
        assert rounded[[2, 3, 5, 6]].isnan().all() and rounded[4] == 1


def test_any_split_into_rows_gives_the_same_bits():
    for columns in (1, 255, 704):
        x = torch.randn(300, columns)
        whole = round_bf16(x, KEY, 0)
        for rows in (slice(0, 1), slice(1, 4), slice(3, 300), slice(7, 7)):
            assert torch.equal(round_bf16(x[rows], KEY, rows.start * columns), whole[rows])


def test_a_portion_more_or_less_changes_nothing(monkeypatch):
    x = torch.randn(5000)
    whole = round_bf16(x, KEY, 3)
    monkeypatch.setattr("rowwise.kernels.portions.ELEMENTS", 997)
    out = torch.empty(5000, dtype=torch.bfloat16)
    round_bf16_(x, out, KEY, 3)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5, 7)])
def test_shapes(shape):
    assert round_bf16(torch.randn(shape), KEY, 0).shape == shape


def agree():
    """In the interpreter: every bit, NaN's apart."""
    from rowwise.kernels.rounding_triton import round_triton_

    ends = torch.tensor([LARGEST, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, 1e-42])
    keys = (0, 1, KEY, 2**64 - 5)
    for i, count in enumerate((0, 1, 255, 256, 257, 704, 1000, 2500)):
        for start in (0, 4, 5, 2**34 + 3)[i // 4 :: 2]:
            x = torch.cat([ends, torch.randn(count)])[: max(count, 9)]
            ours, reference = torch.empty(len(x)).bfloat16(), torch.empty(len(x)).bfloat16()
            round_triton_(x, ours, keys[i % 4], start)
            round_reference_(x, reference, keys[i % 4], start)
            assert torch.equal(ours.isnan(), reference.isnan())
            assert torch.equal(bits_of(ours)[~x.isnan()], bits_of(reference)[~x.isnan()])
    round_triton_(torch.empty(0), torch.empty(0).bfloat16(), KEY, 0)


def test_triton_and_torch_give_the_same_bits():
    interpreted("test_kernels_rounding", "agree")
