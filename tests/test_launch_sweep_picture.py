"""sweep.png: what it says of trials, and how much it says that a setting explains."""

import numpy as np
import pytest
from scipy.stats import kruskal, rankdata

from rowwise.launch.sweep.picture import (
    Result,
    coordinates,
    explained,
    figure_of,
    grouped,
    groups_of,
    importance,
    label_of,
    said,
)


def trials(values, **settings):
    """One of each value, with the settings beside it."""
    rows = [dict(zip(settings, row, strict=True)) for row in zip(*settings.values(), strict=True)]
    return [
        Result(n, row, [(1, 9.0), (4, value)], True) for n, (value, row) in enumerate(zip(values, rows, strict=True))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_what_a_setting_explains_is_the_effect_size_of_kruskal_and_wallis(seed):
    rng = np.random.default_rng(seed)
    n, k = 30, 4
    groups = rng.integers(k, size=n)
    values = np.round(rng.standard_normal(n) + groups * seed / 3, 1)  # with ties
    h = kruskal(*(values[groups == group] for group in range(k))).statistic
    assert explained(rankdata(values), groups.tolist()) == pytest.approx(max(0.0, (h - k + 1) / (n - k)), rel=1e-12)


def test_a_setting_that_decides_and_one_that_does_not():
    optim, lr = ["adamw", "lion"] * 8, ["1e-3"] * 8 + ["1e-2"] * 8
    found = importance(
        trials([2.0 + 0.5 * (name == "lion") + 0.01 * i for i, name in enumerate(optim)], optim=optim, lr=lr)
    )
    assert found["optim"] > 0.7 and found["lr"] < 0.2
    assert importance(trials([2.0, 2.1], optim=["adamw", "lion"])) == {"optim": None}, "two trials say nothing"
    assert importance(trials([2.0] * 4, optim=optim[:4])) == {"optim": None}, "nor do equal ones"


def test_numbers_of_an_interval_are_compared_by_their_size():
    values = [str(0.001 * (i + 1)) for i in range(20)]
    assert groups_of(values) == [i // 5 for i in range(20)]
    assert groups_of(["1e-3", "3e-3", "1e-3"]) == [0, 1, 0] and len(set(groups_of(list("abcdefghij")))) == 10
    best_in_the_middle = [abs(i - 9.5) for i in range(20)]
    assert importance(trials(best_in_the_middle, lr=values))["lr"] > 0.5, "which no correlation finds"


def test_trials_that_differ_in_their_seed_share_a_row():
    rows = grouped(trials([2.0, 2.4, 2.1, 2.1], optim=["a", "a", "b", "b"], seed=["0", "1", "0", "1"]))
    assert [[result.number for result in row] for row in rows] == [[2, 3], [0, 1]]
    assert label_of(rows[0]) == "2 seeds: optim=b" and label_of(rows[1][:1]) == "0: optim=a seed=0"


def test_settings_are_written_as_people_write_them():
    settings = {"optim.lr": "0.00031622776601683794", "model.layers": "12", "optim": "adamw"}
    assert said(settings) == "optim.lr=3.16e-4 model.layers=12 optim=adamw"
    assert said(settings, 40) == "lr=3.16e-4 layers=12 optim=adamw"
    assert said(settings, 10) == "lr=3.16..."


def test_heights_of_settings():
    assert coordinates(["1e-4", "1e-3", "1e-2"]).heights.tolist() == pytest.approx([0, 0.5, 1]), "by their logarithm"
    assert coordinates(["2", "4", "8"]).heights.tolist() == pytest.approx([0, 1 / 3, 1])
    assert coordinates(["b", "a", "b"]).ticks == {0.0: "b", 1.0: "a"} and coordinates(["7"]).heights.tolist() == [0]


def test_the_picture_names_the_best_and_cuts_no_axis_of_bars():
    found = trials([2.3, 2.1, 2.2], optim=["a", "b", "a"], seed=["0", "0", "1"])
    found.append(Result(3, {"optim": "b", "seed": "1"}, [(1, 1.5)], False))  # ended early, where its loss says little
    figure = figure_of(found, "eval_loss")
    assert figure.get_suptitle() == "best: trial-1, eval_loss 2.100\noptim=b seed=0"
    curves, ends, ways, shares = figure.axes
    assert [text.get_text() for text in curves.texts] == ["trial-1"] and "dotted" in curves.get_title(loc="left")
    assert len(curves.lines) == 4 and len(ways.lines) == 3 + 3, "a line a trial, and one a column"
    assert [label.get_text() for label in ends.get_yticklabels()] == ["1: optim=b seed=0", "2 seeds: optim=a"]
    assert not ends.patches, "points: a bar would have to begin at zero"
    assert shares.get_xlim()[0] == 0
    assert len(figure_of([], "loss").axes) == 4
