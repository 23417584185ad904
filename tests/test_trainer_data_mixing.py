"""The order of a mixture: pure functions of whole numbers."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from rowwise.trainer.data.mixing import LARGEST, PARTS, Dealing, counts, deal, shares_of, stretches

HALF = PARTS // 2
PLAIN = Dealing((50, 900, 7), ((0, shares_of([0.2, 0.7, 0.1])),))
CHANGING = Dealing(
    (50, 900, 7),
    ((0, shares_of([5, 4, 0])), (137, shares_of([1, 1, 9])), (138, (0, PARTS, 0)), (500, shares_of([1, 2, 3]))),
)
ENDING = Dealing(
    (50, 900, 7, 0),
    ((0, shares_of([4, 4, 1, 1])), (60, shares_of([0, 0, 1, 0])), (600, shares_of([1, 1, 1, 1]))),
    ends=True,
)


def dealt(dealing: Dealing, first: int, count: int, key: str = "train/0") -> list[tuple[int, int]]:
    """(source, draw) of each sample."""
    return list(zip(*(part.tolist() for part in deal(dealing, key, np.arange(first, first + count))), strict=True))


@pytest.mark.parametrize("dealing", [PLAIN, CHANGING, ENDING], ids=["plain", "changing", "ending"])
@pytest.mark.parametrize("key", ["train/0", "train/1"])
def test_counts_in_closed_form_are_those_of_the_samples_before_and_any_start_gives_the_same_order(dealing, key):
    length = dealing.length or 1000
    whole, seen = dealt(dealing, 0, length, key), [0] * len(dealing.sizes)
    for number, (source, draw) in enumerate(whole):
        assert counts(dealing, key, number) == tuple(seen)
        assert draw == seen[source]  # every source's draws come in their order, none twice and none left out
        seen[source] += 1
    assert counts(dealing, key, length) == tuple(seen)
    for first, count in ((1, 1), (136, 3), (137, 300), (59, 2), (length - 3, 3)):
        assert dealt(dealing, first, count, key) == whole[first : first + count]


@pytest.mark.parametrize("dealing", [PLAIN, CHANGING])
def test_counts_stay_within_two_samples_of_the_sum_of_the_shares(dealing):
    asked = [Fraction(0)] * len(dealing.sizes)
    furthest = Fraction(0)
    for number in range(5000):
        shares = next(shares for first, shares in reversed(dealing.shares) if first <= number)
        asked = [sum_ + Fraction(share, PARTS) for sum_, share in zip(asked, shares, strict=True)]
        found = counts(dealing, "train/0", number + 1)
        furthest = max(furthest, *(abs(count - sum_) for count, sum_ in zip(found, asked, strict=True)))
    assert Fraction(1, 2) < furthest < 2


def test_decimals_are_met_exactly_and_at_once():
    tenths = Dealing((1, 1, 1), ((0, shares_of([0.7, 0.2, 0.1])),))
    for seed in range(20):
        every = [counts(tenths, f"train/{seed}", number) for number in range(0, 200, 10)]
        assert {tuple(np.subtract(b, a)) for a, b in itertools.pairwise(every)} == {(7, 2, 1)}
    far = LARGEST // PARTS * PARTS - PARTS
    assert counts(tenths, "x", far + PARTS) == tuple(
        share * (far // PARTS + 1) for share in (700_000, 200_000, 100_000)
    )
    sources, draws = deal(tenths, "x", np.arange(far, far + 50))
    assert [int(draws[sources == source][0]) for source in range(3)] == list(counts(tenths, "x", far))


def test_seeds_differ_in_where_they_begin():
    orders = {tuple(source for source, _ in dealt(PLAIN, 0, 40, f"train/{seed}")) for seed in range(8)}
    assert len(orders) > 4  # of the places where a pattern of ten can begin


def test_a_source_that_ends_leaves_its_share_to_the_others_and_every_sample_comes_once():
    whole = dealt(ENDING, 0, 957)
    for source, size in enumerate(ENDING.sizes):
        assert [draw for one, draw in whole if one == source] == list(range(size))
    ends = [part.first for part in stretches(ENDING, "train/0")]
    assert ends == sorted(set(ends))
    # 7 samples of the third at one in ten, and of the first none from sample 60 on, where the second takes what is left.
    assert counts(ENDING, "train/0", 60)[2] in (5, 6, 7)
    with pytest.raises(
        ValueError, match=r"sample 957 of a mixture, which has 957; give fewer steps, or data\.when_short=repeat"
    ):
        deal(ENDING, "train/0", np.arange(950, 958))


def test_shares_are_whole_and_none_is_lost():
    for weights in ([1, 1, 1], [1e-9, 1, 3], [0.1] * 7, [0, 0, 5], [1e-12, 1e-12, 1e-12, 1], np.geomspace(1e-8, 1, 50)):
        shares = shares_of(list(weights))
        assert sum(shares) == PARTS
        assert all((share > 0) == (weight > 0) for share, weight in zip(shares, weights, strict=True))
        exact = np.array(weights) / np.sum(weights) * PARTS
        assert np.all(np.abs(shares - exact)[exact >= 1] < 1 + np.count_nonzero(exact < 1))
    assert shares_of([3, 1]) == (3 * PARTS // 4, PARTS // 4)
    for wrong in ([0, 0], [-1, 2]):
        with pytest.raises(ValueError, match="at least 0, and one of them above"):
            shares_of(wrong)
