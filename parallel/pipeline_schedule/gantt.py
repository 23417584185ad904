"""Draws timelines: a row a rank, a bar an action; what stays grey is the bubble."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rowwise.parallel.pipeline_schedule.simulate import Timeline

Color = tuple[float, float, float]

# Okabe and Ito's, which every kind of colour vision tells apart.
COLORS = {"F": "#0072B2", "I": "#E69F00", "W": "#009E73", "B": "#C0568C"}
WORDS = {
    "F": "F  forward",
    "I": "I  gradient of the input",
    "W": "W  gradient of the weights",
    "B": "B  I and W in one",
}
BUBBLE = "#DCDCDC"
ROW = 0.86  # of a rank's height is bar
POINTS = (4.8, 6.5)  # the least and the largest size of micro-batch numbers


class Bar(NamedTuple):
    """An action where it is drawn. `chunk`: which of its rank's stages it is of, along the model."""

    rank: int
    start: float
    end: float
    kind: str
    chunk: int
    micro_batch: int


def draw(timelines: dict[str, Timeline], path: Path, unit: str = "") -> None:
    """Draws a panel for each timeline, under its name and over one time axis, as PNG or SVG by the suffix of `path`.

    Colour is the kind of work, and a rank's later stages are lighter. Bars bear the number of their micro-batch where
    they are wide enough. `unit` is that of the times. Raises ValueError for another suffix, or without timelines.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: pictures are .png or .svg; give a name that ends so")
    if not timelines:
        raise ValueError(f"{path}: there is no timeline to draw")
    bars = [list(_bars(timeline)) for timeline in timelines.values()]
    chunks = 1 + max(bar.chunk for of_panel in bars for bar in of_panel)
    longest = max(timeline.makespan for timeline in timelines.values())
    ranks = [len(timeline.ends) for timeline in timelines.values()]
    row_inches = min(0.34, max(0.05, 6.0 / max(ranks)))
    # Two digits in a narrow bar, within what a screen and a page hold.
    width = min(16.0, max(8.0, 1.0 + 0.145 * longest / min(map(_narrow, bars))))

    size = (width, row_inches * sum(ranks) + 0.45 * len(ranks) + 0.8)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    panels = figure.subplots(len(ranks), 1, sharex=True, squeeze=False, height_ratios=ranks)[:, 0]
    for panel, (name, timeline) in zip(panels, timelines.items(), strict=True):
        _set_up(panel, name, timeline, row_inches)
    panels[-1].set_xlim(0, longest)
    panels[-1].set_xlabel(f"time ({unit})" if unit else "time", fontsize=9)
    _draw_legend(figure, {bar.kind for of_panel in bars for bar in of_panel}, chunks)
    # How many points a bar has, and so which numbers fit, is known once the layout is.
    figure.draw_without_rendering()
    for panel, of_panel in zip(panels, bars, strict=True):
        points = panel.get_window_extent().width * 72 / figure.dpi / longest
        _draw_bars(panel, of_panel, chunks, points)
        if row_inches * 72 > POINTS[1]:
            _draw_numbers(panel, of_panel, chunks, points)
    figure.savefig(path)


def lighten(color: str, chunk: int, chunks: int) -> Color:
    """Returns `color` for the first chunk of a rank, from there evenly towards white."""
    red, green, blue = to_rgb(color)
    white = 0.55 * chunk / max(1, chunks - 1)
    return red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white


def _bars(timeline: Timeline) -> Iterator[Bar]:
    begin = min(starts[0] for starts in timeline.starts if starts)
    for rank, actions in enumerate(timeline.schedule.ranks):
        chunk_of = {stage: chunk for chunk, stage in enumerate(timeline.schedule.stages_of(rank))}
        for (stage, kind, i), start, end in zip(actions, timeline.starts[rank], timeline.ends[rank], strict=True):
            yield Bar(rank, start - begin, end - begin, kind, chunk_of[stage], i)


def _narrow(bars: list[Bar]) -> float:
    """The length than which nine bars of ten are longer."""
    lengths = sorted(bar.end - bar.start for bar in bars if bar.end > bar.start)
    return lengths[len(lengths) // 10] if lengths else 1.0


def _set_up(panel: Axes, name: str, timeline: Timeline, row_inches: float) -> None:
    ranks = len(timeline.ends)
    panel.set_title(name, loc="left", fontsize=10, fontweight="bold")
    panel.set_title(f"makespan {timeline.makespan:.4g},  bubble {timeline.bubble:.1%}", loc="right", fontsize=10)
    panel.set_ylim(ranks - 0.5, -0.5)
    panel.set_ylabel("rank", fontsize=9)
    panel.set_yticks(range(0, ranks, -(-16 // round(100 * row_inches))))
    panel.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 5, 10]))
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.barh(range(ranks), timeline.makespan, height=ROW, color=BUBBLE, linewidth=0)


def _draw_bars(panel: Axes, bars: list[Bar], chunks: int, points: float) -> None:
    """`points` are those of a unit of time: the lines between bars are thinner where bars are narrow."""
    shades = {(kind, chunk): lighten(COLORS[kind], chunk, chunks) for kind in COLORS for chunk in range(chunks)}
    corners = [
        [(bar.start, y), (bar.end, y), (bar.end, y + ROW), (bar.start, y + ROW)]
        for bar in bars
        for y in [bar.rank - ROW / 2]
    ]
    collection = PolyCollection(
        corners,
        facecolors=[shades[bar.kind, bar.chunk] for bar in bars],
        edgecolors="white",
        linewidths=min(0.35, 0.04 * points * _narrow(bars)),
        rasterized=len(bars) > 20_000,  # pixels in an SVG too, which a browser could not show otherwise
    )
    panel.add_collection(collection, autolim=False)


def _draw_numbers(panel: Axes, bars: list[Bar], chunks: int, points: float) -> None:
    """`points` are those of a unit of time. All numbers are of the size at which the largest fits into a narrow bar."""
    digits = len(str(max(bar.micro_batch for bar in bars)))
    size = min(POINTS[1], (points * _narrow(bars) - 1) / (0.64 * digits))
    if size < POINTS[0]:
        return
    for bar in bars:
        if (bar.end - bar.start) * points >= 0.64 * size * len(str(bar.micro_batch)):
            red, green, blue = lighten(COLORS[bar.kind], bar.chunk, chunks)
            panel.text(
                (bar.start + bar.end) / 2,
                bar.rank,
                str(bar.micro_batch),
                fontsize=size,
                color="white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.52 else "black",
                ha="center",
                va="center_baseline",
            )


def _draw_legend(figure: Figure, kinds: Collection[str], chunks: int) -> None:
    entries = {WORDS[kind]: COLORS[kind] for kind in COLORS if kind in kinds}
    if chunks > 1:
        entries["a rank's first to last stage"] = "#505050"
    swatches: dict[str, Any] = {  # matplotlib's types know of no tuples as handles
        words: tuple(Patch(color=lighten(color, chunk, chunks), linewidth=0) for chunk in range(chunks))
        for words, color in entries.items()
    }
    swatches["bubble"] = (Patch(color=BUBBLE, linewidth=0),)
    figure.legend(
        list(swatches.values()),
        list(swatches),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=max(1.6, 0.8 * chunks),
        loc="outside lower center",
        ncols=len(swatches),
        fontsize=8,
        frameon=False,
    )
