"""Panels of a page: small pictures as SVG that stands in the page itself, with its text as text.

A panel is drawn at the width at which it is shown, so that its letters are as large as they say. matplotlib is imported
where a picture is made, so that a refusal need not wait for it.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from rowwise.launch.pages.markup import Marked, figure, short, text
from rowwise.launch.pages.records import Curve, Run, smooth, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 370, 230  # pixels of a panel
PAGE = 1200  # of the widest picture that a large screen shows whole
# Okabe and Ito's, without the yellow that white hides; further runs are dashed.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#E69F00", "#505050")
DASHES = ("", "6 2", "2 2", "8 2 2 2")
GREY = "#C8C8C8"
STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten
SVG = "http://www.w3.org/2000/svg"
STYLE: Any = {  # matplotlib types each key by its name
    "svg.fonttype": "none",
    "svg.hashsalt": "rowwise",  # the same run makes the same page
    "text.parse_math": False,  # a name may hold a $
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


Form = Callable[[float], str]  # writes a number


def color(order: int) -> str:
    return COLORS[order % len(COLORS)]


def dashes(order: int) -> str:
    return DASHES[order // len(COLORS) % len(DASHES)]


def swatch(fill: str, pattern: str = "") -> Marked:
    """Returns a piece of line, for a legend in text."""
    return Marked(
        '<svg class="swatch" width="22" height="10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="22" y2="5" stroke="{fill}" stroke-width="4" stroke-dasharray="{pattern}"/></svg>'
    )


def name_of(run: Run) -> Marked:
    """Returns a run's name behind its colour."""
    return Marked(f"{swatch(color(run.order), dashes(run.order))}{text(run.label)}")


def title_of(title: str, run: Run, runs: Sequence[Run]) -> str:
    """Returns the title of a picture of one run; it names the run where there are several."""
    return f"{title}: {run.label}" if len(runs) > 1 else title


def line_of(run: Run, runs: Sequence[Run], words: str) -> str:
    """Returns a line of a caption (HTML); it names the run where there are several."""
    return f'<span class="run">{name_of(run)}: {words}</span>' if len(runs) > 1 else words


def picture(label: str, paint: Callable[["Axes"], None], height: int = HEIGHT, width: int = WIDTH) -> str:
    """Draws what `paint` paints, as SVG; `label` is read to those who do not see it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        panel = Figure(figsize=(width / 72, height / 72), layout="constrained")
        panel.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)  # type: ignore[union-attr,call-arg]
        paint(panel.subplots())
        file = StringIO()
        panel.savefig(file, format="svg")
    return inline(file.getvalue(), label)


def inline(svg: str, label: str) -> str:
    """Returns a matplotlib SVG for a page: its ids are its own, since all pictures of a page share one space of names, and what
    is no picture is left out. Outside of a grid it is shown a quarter larger, or as the page allows."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    own = "p" + hashlib.sha256(label.encode() + ElementTree.tostring(root)).hexdigest()[:10]
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _attribute(key.rpartition("}")[2], value, own))
    _, _, width, height = map(float, root.get("viewBox", "0 0 0 0").split())
    scale = min(1.25, max(1.0, PAGE / width))
    root.attrib |= {"role": "img", "aria-label": label, "width": f"{width * scale:g}", "height": f"{height * scale:g}"}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, own: str) -> str:
    if key == "id":
        return f"{own}-{value}"
    if key == "d":  # a tenth of a pixel is not seen
        return " ".join(re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.1f}", value).split())
    if key == "style":  # the page's own letters
        value = re.sub(r"(font: [\d.]+px) [^;]*", r"\1 system-ui, sans-serif", value)
    return re.sub(r"^#|url\(#", lambda start: f"{start[0]}{own}-", value) if "#" in value else value


def last_of(known: Curve, form: Form) -> list[str]:
    """Returns what a caption says of a curve without gaps, the phrase that matters first."""
    low, high = np.min(known.values), np.max(known.values)
    told = f"{form(known.values[-1])} at step {known.steps[-1]:,.0f}"
    return [told] if low == high else [told, f"from {form(low)} to {form(high)}"]


def median_of(known: Curve, form: Form) -> list[str]:
    """Says what a caption says of a curve whose last number says little: its median."""
    return [f"median {form(float(np.median(known.values)))}", *last_of(known, form)]


def curves(
    runs: Sequence[Run],
    field: str,
    title: str,
    unit: str,
    form: Form = short,
    tell: Callable[[Curve, Form], list[str]] = last_of,
    smoothed: bool = False,
    decades: float = 100,
    scale: float = 1,
    ticks: Form | None = None,
) -> str:
    """Returns the figure of a field over steps, a line a run; nothing where no run has it. `form` writes a number, `tell` what the
    caption says of a curve, of several curves its first phrase. `smoothed`: the records thin, their means thick. The axis is
    of powers of ten where the numbers span a factor of more than `decades`, and of numbers divided by `scale`, written by `ticks`."""
    there = [(run, curve.known) for run in runs if (curve := run.curve(field)) is not None]
    if not there:
        return ""
    lines = [(run.order, Curve(run.curves[field].steps, run.curves[field].values / scale)) for run, _ in there]
    told = {run.label: "; ".join(tell(known, form)[: 1 if len(runs) > 1 else None]) for run, known in there}
    caption = "".join(line_of(run, runs, text(told[run.label])) for run, _ in there)
    spoken = "; ".join(f"{label}: {words}" for label, words in told.items())

    def paint(axes: "Axes") -> None:
        values = np.concatenate([curve.known.values for _, curve in lines])
        draw_lines(axes, lines, smoothed)
        for run, _ in there:
            mark_resumes(axes, run)
        dress(
            axes,
            unit,
            ticks or (form if scale == 1 else short),
            log=values.min() > 0 and values.max() > decades * values.min(),
        )
        if values.min() == values.max():
            low, high = sorted([0, 2 * values[0] or 1])
            axes.set_ylim(low, high)

    return figure(title, caption, picture(f"{title} over steps. {spoken}", paint))


def draw_lines(axes: "Axes", lines: Sequence[tuple[int, Curve]], smoothed: bool) -> None:
    for order, curve in lines:
        style: dict[str, Any] = {"color": color(order)}
        if pattern := dashes(order):
            style["dashes"] = [float(length) / 1.8 for length in pattern.split()]
        means = smoothed and len(curve.steps) >= 100  # fewer are smoothed by nothing
        raw = thin(curve)
        axes.plot(raw.steps, raw.values, linewidth=0.7 if means else 1.6, alpha=0.3 if means else 1, **style)
        if means:
            mean = thin(smooth(curve))
            axes.plot(mean.steps, mean.values, linewidth=1.8, **style)
        alone = _alone(raw)
        axes.plot(alone.steps, alone.values, "o", markersize=4, color=color(order))


def mark_resumes(axes: "Axes", run: Run) -> None:
    """Draws a dotted line where the run was resumed."""
    for step in run.resumed:
        axes.axvline(step + 0.5, color=color(run.order), linewidth=1, linestyle=":", gid=f"resumed-{run.order}-{step}")


def _alone(curve: Curve) -> Curve:
    """The points that no line shows: between two gaps; and all of a curve of few."""
    few = len(curve.steps) <= 12
    gaps = np.isnan(np.concatenate([[np.nan], curve.values, [np.nan]]))
    here = ~gaps[1:-1] & (few | (gaps[:-2] & gaps[2:]))
    return Curve(curve.steps[here], curve.values[here])


def dress(axes: "Axes", unit: str, form: Form = short, log: bool = False, x: str = "step") -> None:
    """Dresses axes with their units, and numbers that fit. The y axis has its name above it, where it takes no width."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(unit, loc="left", color="#333333")
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def shares(parts: Sequence[tuple[str, str, str]]) -> str:
    """Returns a legend in text that says the numbers: of (name, colour, number) each."""
    return " ".join(
        f'<span class="key">{swatch(fill)}{text(name)} {text(number)}</span>' for name, fill, number in parts
    )
