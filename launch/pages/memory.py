"""What the runs hold: the peak over steps, and by category on every rank where memory.json says so, as predicted and as measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rowwise.launch.pages.draw import COLORS, GREY, curves, dress, line_of, picture, shares, title_of
from rowwise.launch.pages.markup import figure, grid, size, table
from rowwise.launch.pages.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIELDS = frozenset({"peak_memory_bytes"})
CATEGORIES = {
    "parameters": COLORS[0],
    "gradients": COLORS[5],
    "optimizer": COLORS[2],
    "masks": COLORS[3],
    "average": COLORS[4],
}
BESIDE = ("host", "file")  # the device: what waits there
REST = "activations and the rest"
MEBI, GIBI = 2**20, 2**30


def show(runs: Sequence[Run]) -> list[str]:
    """Draws the section: the peak over the steps of all runs, and of each that has a memory.json its ranks."""
    measured = [(run, document) for run in runs if (document := run.document("memory.json")) is not None]
    peaks = [curve.known.values.max() for run in runs if (curve := run.curve("peak_memory_bytes")) is not None]
    unit, word = _unit(max(peaks, default=0))
    over_steps = curves(runs, "peak_memory_bytes", "Peak memory", f"{word} of rank 0 since the start", size, scale=unit)
    return [
        *grid([over_steps, *(by_rank(run, document, runs) for run, document in measured)]),
        *(numbers(run, document) for run, document in measured),
        *(told for run, document in measured if (told := foretold(run, document)) is not None),
    ]


def bars(document: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Reads (name, bytes by category) of each rank. Raises ValueError."""
    ranks = document.get("ranks")
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks) or not ranks:
        raise ValueError('memory.json has no list "ranks" of the bytes of each')
    return [(f"rank {i}", rank) for i, rank in enumerate(ranks)]


def parts(held: dict[str, float]) -> dict[str, float]:
    """Splits what a rank held into bytes by category, and what the peak has beside them: activations, buffers, and on a CPU, where the
    peak is the whole process's, its libraries too."""
    known = {name: float(held.get(name) or 0) for name in CATEGORIES}
    return {**known, REST: max(0.0, (held.get("peak") or 0) - sum(known.values()))}


def by_rank(run: Run, document: dict[str, Any], runs: Sequence[Run]) -> str:
    """Draws what each rank of a run held, as a bar."""
    columns = [(name, parts(held)) for name, held in bars(document)]
    colors = {**CATEGORIES, REST: GREY}
    largest = max((held for _, held in columns), key=lambda held: sum(held.values()))
    unit, word = _unit(sum(largest.values()))

    def paint(axes: "Axes") -> None:
        bottom = np.zeros(len(columns))
        for name, fill in colors.items():
            heights = np.array([held[name] for _, held in columns]) / unit
            axes.bar(range(len(columns)), heights, bottom=bottom, color=fill, width=0.8, linewidth=0)
            bottom += heights
        dress(axes, word, x="")
        axes.set_ylim(0, 1.06 * bottom.max() or 1)
        axes.set_xlim(-0.6, max(len(columns), 4) - 0.4)  # few bars are no walls
        every = -(-len(columns) // 5)
        axes.set_xticks(range(0, len(columns), every), [name for name, _ in columns][::every])
        axes.grid(axis="x", visible=False)

    legend = shares([(name, fill, size(largest[name])) for name, fill in colors.items() if largest[name]])
    spoken = ", ".join(f"{name} {size(held)}" for name, held in largest.items() if held)
    label = f"Memory of each rank of {run.label} by category; the largest: {spoken}"
    return figure(
        title_of("Memory by category", run, runs), line_of(run, runs, f"largest rank: {legend}"), picture(label, paint)
    )


def numbers(run: Run, document: dict[str, Any]) -> str:
    """Lists what each rank held, as a table."""
    beside = [key for key in BESIDE if any(held.get(key) for _, held in bars(document))]
    head = ["rank", *CATEGORIES, REST, "peak", *beside]
    columns = [(name, held | ({REST: parts(held)[REST]} if held.get("peak") else {})) for name, held in bars(document)]
    rows = [[name, *("-" if held.get(key) is None else size(held[key]) for key in head[1:])] for name, held in columns]
    note = "; the peak is the whole process's, with its libraries" if document.get("device") == "cpu" else ""
    return table(f"Memory of {run.label} on {document.get('device', 'its device')} in the first step{note}", head, rows)


def foretold(run: Run, document: dict[str, Any]) -> str | None:
    """Tells what was predicted of each rank's first step and what was measured, by category; None where memory.json says neither, as
    of a release before. A GPU's allocator knows the total alone."""
    ranks = [(name, predicted, held) for name, held in bars(document) if (predicted := _bytes(held.get("predicted")))]
    if not ranks:
        return None
    keys = [key for key in ranks[0][1] if any(predicted.get(key) for _, predicted, _ in ranks)]
    rows = []
    for name, predicted, held in ranks:
        measured = _bytes(held.get("measured")) or {"total": float(held.get("peak") or 0)}
        rows.append([f"{name}, predicted", *(size(predicted.get(key, 0.0)) for key in keys)])
        rows.append([f"{name}, measured", *(size(measured[key]) if key in measured else "-" for key in keys)])
    return table(
        f"Memory of {run.label} in its first step, predicted and measured; each category at its most", ["", *keys], rows
    )


def _bytes(told: Any) -> dict[str, float]:
    """Bytes by category; none of what is no such table."""
    if not isinstance(told, dict):
        return {}
    return {str(key): float(value) for key, value in told.items() if isinstance(value, int | float)}


def _unit(largest: float) -> tuple[int, str]:
    return (GIBI, "GiB") if largest >= GIBI else (MEBI, "MiB")
