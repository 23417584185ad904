"""sweep.png: what every trial measured, where each ended, which settings lead where, and how much each setting explains.

How much a setting explains is a number of ranks: the trials are ranked by the goal, and the share of the variance of the
ranks that lies between the setting's values, less what chance alone puts there, is Kruskal and Wallis's effect size,

    eta^2 = (H - k + 1) / (n - k),      H = (n - 1) (variance between the k values) / (variance of all n ranks)

(Tomczak & Tomczak, 2014). It is of a setting by itself: what two do together is in neither's number. Optuna's fANOVA
needs scikit-learn, and its PED-ANOVA hundreds of trials; this one says something of a grid of four.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from rowwise.launch.pages.markup import loss, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (13.0, 9.0)  # inches
MOST = 20  # rows of where the trials ended
BINS, PER_BIN = 4, 3  # of a number that has more values than that
SEED = "seed"  # trials that differ in nothing else are one row, whose spread is shown
WIDEST = 60  # letters of a label


@dataclass(frozen=True)
class Result:
    """What a trial of `settings` measured: (step, goal) each; `complete`: whether it came to its end."""

    number: int
    settings: dict[str, str]
    points: list[tuple[int, float]]
    complete: bool

    @property
    def value(self) -> float:
        return self.points[-1][1]


def draw(results: Sequence[Result], path: Path, goal: str) -> None:
    """Writes the picture of trials of which each has at least a point."""
    figure_of(results, goal).savefig(path, dpi=120)


def figure_of(results: Sequence[Result], goal: str) -> "Figure":
    """Returns the four panels; empty ones where nothing was measured."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ranked = sorted(results, key=lambda result: (not result.complete, result.value))
    ended = [result for result in ranked if result.complete] or ranked
    shades = map(tuple, colormaps["viridis"](np.linspace(0, 0.9, len(ranked))))
    colours = dict(zip([result.number for result in ranked], shades, strict=True))
    figure = Figure(figsize=SIZE, layout="constrained")
    (curves, ends), (ways, shares) = figure.subplots(2, 2, width_ratios=[3, 2])
    if ranked:
        best = ended[0]
        figure.suptitle(f"best: {_named(best)}, {goal} {loss(best.value)}\n{said(best.settings, 110)}", fontsize=11)
        draw_curves(curves, ranked, colours, goal)
        draw_ends(ends, ended, colours, goal)
        draw_ways(ways, ended, colours, goal)
        draw_importance(shares, importance(ended), len(ended))
    return figure


def _named(result: Result) -> str:
    return f"trial-{result.number}"


def said(settings: dict[str, str], most: int = WIDEST) -> str:
    """Writes settings in a line, with numbers as people write them; where they do not fit, without the groups of their keys."""
    told = " ".join(f"{key}={written(value)}" for key, value in settings.items())
    if len(told) > most:
        told = " ".join(f"{key.rpartition('.')[2]}={written(value)}" for key, value in settings.items())
    return told if len(told) <= most else f"{told[: most - 3]}..."


def written(value: str) -> str:
    """Returns a value as people write it: 0.00031622776 is 3.16e-4."""
    found = as_number(value)
    return value if found is None or value.lstrip("+-").isdecimal() else rate(found)


def as_number(value: str) -> float | None:
    try:
        found = float(value)
    except ValueError:
        return None
    return found if np.isfinite(found) else None


def draw_curves(axes: "Axes", ranked: Sequence[Result], colours: dict, goal: str) -> None:
    """Draws the goal over steps; the best thick, with its name at its end."""
    for place, result in reversed(list(enumerate(ranked))):
        steps, values = zip(*result.points, strict=True)
        marker = "." if len(steps) < 30 else ""
        style = "-" if result.complete else ":"
        axes.plot(steps, values, style, marker=marker, color=colours[result.number], linewidth=1 if place else 2.4)
    (step, value), best = ranked[0].points[-1], ranked[0]
    axes.annotate(_named(best), (step, value), xytext=(7, -3), textcoords="offset points", fontsize=9)
    axes.margins(x=0.1)
    dotted = "; dotted: ended before their last step" if not all(result.complete for result in ranked) else ""
    axes.set_title(f"{goal} over steps, the darker the better{dotted}", loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(visible=True, color="#e4e4e4")


def draw_ends(axes: "Axes", ended: Sequence[Result], colours: dict, goal: str) -> None:
    """Draws a point a trial, the best row on top; trials that differ in their seed alone share a row, with a line over their
    spread and a stroke at their mean."""
    rows = grouped(ended)[:MOST]
    for place, group in enumerate(rows):
        values = [result.value for result in group]
        axes.plot([min(values), max(values)], [place, place], color="#999999", linewidth=1.5, zorder=1)
        if len(group) > 1:
            axes.plot([np.mean(values)], [place], "|", color="#333333", markersize=12, zorder=3)
        axes.scatter(values, [place] * len(values), color=[colours[result.number] for result in group], s=30, zorder=2)
    axes.set_yticks(range(len(rows)), [label_of(group) for group in rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", color="#e4e4e4")
    left_out = len(grouped(ended)) - len(rows)
    axes.set_title(f"{goal} at the end" + (f" (and {left_out} more)" if left_out else ""), loc="left", fontsize=10)


def grouped(ended: Sequence[Result]) -> list[list[Result]]:
    """Groups trials by all settings but the seed, the group with the least mean first."""
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for result in ended:
        groups[tuple(pair for pair in result.settings.items() if pair[0] != SEED)].append(result)
    return sorted(groups.values(), key=lambda group: np.mean([result.value for result in group]))


def label_of(group: Sequence[Result]) -> str:
    settings = group[0].settings
    if len(group) == 1:
        return f"{group[0].number}: {said(settings)}"
    rest = {key: value for key, value in settings.items() if key != SEED}
    return f"{len(group)} seeds: {said(rest)}"


def draw_ways(axes: "Axes", ended: Sequence[Result], colours: dict, goal: str) -> None:
    """Draws parallel coordinates: a line a trial through its value of each setting to what it measured."""
    keys = list(ended[0].settings)
    columns = [coordinates([result.settings[key] for result in ended]) for key in keys]
    values = np.array([result.value for result in ended])
    low, high = values.min(), values.max()
    heights = np.array(
        [*(column.heights for column in columns), (values - low) / (high - low) if high > low else values * 0]
    )
    for place, result in reversed(list(enumerate(ended))):
        axes.plot(
            heights[:, place], color=colours[result.number], linewidth=0.9 if place else 2.6, alpha=0.8 if place else 1
        )
    ticks = [
        *(column.ticks for column in columns),
        {0.0: loss(low), 1.0: loss(high)} if high > low else {0.0: loss(low)},
    ]
    for x, marks in enumerate(ticks):
        axes.axvline(x, color="#bbbbbb", linewidth=1, zorder=0)
        for height, told in marks.items():
            at_end = x == len(ticks) - 1
            axes.annotate(
                told, (x, height), xytext=(4 if not at_end else -4, 0), textcoords="offset points",
                ha="right" if at_end else "left", va="center", fontsize=7,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            )  # fmt: skip
    axes.set_xticks(range(len(ticks)), [*keys, goal], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(ticks) - 0.9)
    axes.set_title("each trial's settings, and where they lead: down is better", loc="left", fontsize=10)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)


@dataclass(frozen=True)
class Coordinates:
    """Heights from 0 to 1 of a setting's values, and what stands at some of them."""

    heights: np.ndarray
    ticks: dict[float, str]


def coordinates(values: Sequence[str]) -> Coordinates:
    """Places numbers by their size, or its logarithm where they span more than a decade; words in their order."""
    numbers = [as_number(value) for value in values]
    if any(number is None for number in numbers):
        places = {value: i for i, value in enumerate(dict.fromkeys(values))}
        scale = max(1, len(places) - 1)
        ticks = {i / scale: written(value) for value, i in places.items()}
        return Coordinates(np.array([places[value] / scale for value in values]), ticks)
    known = np.array(numbers, dtype=float)
    spread = np.log(known) if known.min() > 0 and known.max() > 10 * known.min() else known
    heights = (spread - spread.min()) / (np.ptp(spread) or 1)
    found = dict(sorted(zip(heights.tolist(), map(written, values), strict=True)))
    kept = found if len(found) <= 8 else {height: found[height] for height in (min(found), max(found))}
    return Coordinates(heights, kept)


def importance(ended: Sequence[Result]) -> dict[str, float | None]:
    """Says how much each setting explains of the trials' ranks, from 0 to 1; None where there are too few to say."""
    ranks = rankdata([result.value for result in ended])
    return {key: explained(ranks, groups_of([result.settings[key] for result in ended])) for key in ended[0].settings}


def groups_of(values: Sequence[str]) -> list[int]:
    """Returns the group of each: those of one value, or, of a number that is nearly everywhere another, of like size."""
    different = len(set(values))
    numbers = [as_number(value) for value in values]
    if different > max(BINS, len(values) // 2) and all(number is not None for number in numbers):
        bins = max(1, min(BINS, len(values) // PER_BIN))
        places = rankdata(numbers, method="ordinal") - 1
        return [int(place * bins // len(values)) for place in places]
    return [list(dict.fromkeys(values)).index(value) for value in values]


def explained(ranks: np.ndarray, groups: Sequence[int]) -> float | None:
    """Computes Kruskal and Wallis's eta^2 of ranks in groups, 0 where chance alone would give more."""
    of, n, k = np.asarray(groups), len(ranks), len(set(groups))
    total = ((ranks - ranks.mean()) ** 2).sum()
    if k < 2 or n <= k or total == 0:
        return None
    between = sum((of == group).sum() * (ranks[of == group].mean() - ranks.mean()) ** 2 for group in set(groups))
    return float(max(0.0, ((n - 1) * between / total - k + 1) / (n - k)))


def draw_importance(axes: "Axes", found: dict[str, float | None], trials: int) -> None:
    """Draws a bar a setting from 0 to 1, the longest on top."""
    known = sorted(((share, key) for key, share in found.items() if share is not None), reverse=True)
    axes.barh(range(len(known)), [share for share, _ in known], color="#0072B2", height=0.6)
    for place, (share, _) in enumerate(known):
        axes.annotate(
            f"{100 * share:.0f} %", (share, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(known)), [key for _, key in known], fontsize=8)
    axes.set_ylim(max(2.5, len(known) - 0.5), -0.5)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    told = (
        f"share of the {trials} trials' ranks that a setting explains"
        if known
        else "too few trials to say what explains them"
    )
    axes.set_title(told, loc="left", fontsize=10)
    axes.set_xlabel("by itself, less what chance gives (Kruskal-Wallis)")
