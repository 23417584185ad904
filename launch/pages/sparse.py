"""What masks do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rowwise.launch.pages.draw import curves, line_of, picture, title_of
from rowwise.launch.pages.markup import figure, grid, paragraph, percent, short, text, whole
from rowwise.launch.pages.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOPS = ("flops_per_token_forward", "flops_per_token_backward")
FIELDS = frozenset(
    {"density", "density_by_layer", "flops_of_dense", "dead_neurons", "mask_overlap_first", "mask_replaced", *FLOPS}
)


def show(runs: Sequence[Run]) -> list[str]:
    figures = [
        curves(runs, "density", "Density", "of the sparse matrices' weights", form=percent),
        *(by_matrix(run, runs) for run in runs),
        curves(runs, "flops_of_dense", "Operations against dense", "of the dense run's FLOPs", form=percent),
        curves(runs, "dead_neurons", "Dead neurons", "rows without a weight", form=whole),
        curves(runs, "mask_overlap_first", "Overlap with the first mask", "of the first mask's weights", form=percent),
        curves(runs, "mask_replaced", "Mask replaced", "of the weights, since last counted", form=percent),
    ]
    return [*grid(figures), *filter(None, map(operations, runs))]


def operations(run: Run) -> str:
    """Shows the operations of the last step, per token."""
    counted = [run.curve(name) for name in FLOPS]
    if None in counted:
        return ""
    forward, backward = (short(curve.known.values[-1]) for curve in counted if curve is not None)
    return paragraph(
        f"{run.label}: {forward} floating-point operations a token forward and {backward} backward when last counted, "
        "were zeros left out."
    )


def by_matrix(run: Run, runs: Sequence[Run]) -> str:
    """Returns a map of the last densities: a row for each kind of matrix, a column a block."""
    if "density_by_layer" not in run.tables:
        return ""
    step, densities = run.tables["density_by_layer"].last
    kinds, blocks, grid_ = arrange(densities)
    low, high = min(densities, key=densities.__getitem__), max(densities, key=densities.__getitem__)
    told = f"at step {step}: from {percent(densities[low])} ({low}) to {percent(densities[high])} ({high})"

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter

        mesh = axes.pcolormesh(np.ma.masked_invalid(grid_), cmap="cividis", edgecolors="white", linewidth=0.5)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
        every = -(-len(blocks) // 8)
        axes.set_xticks(np.arange(len(blocks))[::every] + 0.5, blocks[::every])
        axes.invert_yaxis()
        axes.set_xlabel("block")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        bar = axes.figure.colorbar(mesh, ax=axes, format=FuncFormatter(lambda value, _: percent(value)))
        bar.outline.set_visible(False)

    label = f"Density of each matrix of {run.label}, {told}"
    return figure(
        title_of("Density by matrix", run, runs),
        line_of(run, runs, text(told)),
        picture(label, paint, height=max(150, 70 + 22 * len(kinds))),
    )


def arrange(values: dict[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Returns (kinds, blocks, values of each): blocks.3.attention.wq.weight is of kind attention.wq in block 3; what is in no
    block stands in a column of its own."""
    places = {}
    for name in values:
        parts = name.removesuffix(".weight").split(".")
        inside = len(parts) > 2 and parts[1].isdecimal()
        places[name] = (".".join(parts[2:]), int(parts[1])) if inside else (".".join(parts), -1)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()})
    table = np.full((len(kinds), len(blocks)), np.nan)
    for name, (kind, block) in places.items():
        table[kinds.index(kind), blocks.index(block)] = values[name]
    return kinds, ["-" if block < 0 else str(block) for block in blocks], table
