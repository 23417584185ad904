"""The step of a pipeline that was traced, under what its schedule and its times predict."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rowwise.launch.pages.draw import STYLE, inline, shares
from rowwise.launch.pages.markup import duration, figure, paragraph, percent, scroll, text
from rowwise.launch.pages.records import Run

FIELDS: frozenset[str] = frozenset()


def show(runs: Sequence[Run]) -> list[str]:
    return [piece for run in runs if (run.folder / "pipeline" / "trace.json").is_file() for piece in of_run(run)]


def of_run(run: Run) -> list[str]:
    """Returns the picture and the table of `rowwise.launch.schedule`. Raises ValueError where the files do not fit."""
    import matplotlib

    from rowwise.launch.schedule import show as show_schedule
    from rowwise.parallel.pipeline_schedule.gantt import COLORS, WORDS
    from rowwise.parallel.pipeline_schedule.trace import read_trace

    measured = read_trace(run.folder / "pipeline" / "trace.json")
    with TemporaryDirectory() as folder, matplotlib.rc_context({k: STYLE[k] for k in ("svg.fonttype", "svg.hashsalt")}):
        drawn = Path(folder) / "timeline.svg"
        numbers = show_schedule(f"run={run.folder}", f"to={drawn}")
        svg = drawn.read_text()
    found = f"measured: {duration(measured.makespan)}, bubble {percent(measured.bubble)}"
    kinds = {action.kind for actions in measured.schedule.ranks for action in actions}
    legend = shares([(WORDS[kind], fill, "") for kind, fill in COLORS.items() if kind in kinds])
    step = run.setting("parallel.pipeline_trace")
    title = f"{run.label}, step {step}" if step else run.label
    label = f"Timeline of a pipeline step of {run.label}, a row a rank; {found}"
    return [
        figure(title, f"{text(found)}<br>{legend}", inline(svg, label), wide=True),
        paragraph("Times are in seconds."),
        scroll(f"Ranks of {run.label}", f"<pre>{text(numbers)}</pre>"),
    ]
