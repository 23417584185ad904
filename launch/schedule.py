"""A pipeline schedule, looked at before it is trained with: its table, its picture, its CSV.

    python -m rowwise.launch.schedule zb_v ranks=4 micro_batches=12 to=zb_v.png
    python -m rowwise.launch.schedule schedule.csv forward=1 input=1.2 weight=0.8 send=0.1
    python -m rowwise.launch.schedule run=runs/NAME to=measured.png

First comes a schedule's name, a CSV file, or a run: what it measured, under what its schedule and its costs predict.

    ranks=4 micro_batches=12               of a schedule by name; a CSV file says its own, as in the next two lines
    chunks=2                               stages a rank; default: the fewest that the schedule takes
    unit=4                                 micro-batches in a unit of blockwise; default: as many as ranks
    forward=1 input=1 weight=1             times of F, I, W of a stage (B takes input + weight); a run has its own
    send=0 gather=0 step=0                 times of a message, a gather, an optimizer step
    gathering=none                         or weights gathered for every micro_batch, or for every run of one stage
    synchronised=true                      false: no rank waits for another's optimizer step; `busy` is then of that
    to=FILE.png  csv=FILE.csv              the picture (.png or .svg) and the schedule, to be written

Exit code 0: the table is printed and all is written; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import difflib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from rowwise.launch.settings import bare_words
from rowwise.parallel.pipeline_schedule.check import check_schedule
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Schedule, read_csv, write_csv
from rowwise.parallel.pipeline_schedule.simulate import (
    Costs,
    Gathering,
    Timeline,
    gathers,
    peak_activations,
    period,
    simulate,
    uniform_costs,
)
from rowwise.parallel.pipeline_schedule.trace import read_trace

SHAPE = {"ranks", "micro_batches", "chunks", "unit"}
TIMES = {"forward", "input", "weight", "send", "gather", "step"}


@dataclass(frozen=True)
class Settings:
    """The keys, as they were given; a count of 0 and an empty path were not."""

    ranks: int = 0
    micro_batches: int = 0
    chunks: int = 0
    unit: int = 0
    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    send: float = 0.0
    gather: float = 0.0
    step: float = 0.0
    gathering: Gathering = "none"
    synchronised: bool = True
    to: str = ""
    csv: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and writes what was asked for. Returns the exit code."""
    what = "NAME | FILE.csv | run=runs/NAME, then KEY=VALUE"
    words = bare_words("rowwise.launch.schedule", __doc__, arguments, what)
    try:
        print(show(*words))
    except (ValueError, OSError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def show(what: str = "", *words: str) -> str:
    """Writes what `words` ask for, and returns the table of `what`, a schedule or a run. Raises ValueError."""
    given = parse(words)
    settings = Settings(**given)
    if what.startswith("run="):
        _refuse(what, given.keys() & (SHAPE | TIMES | {"csv"}))
        return show_run(Path(what.removeprefix("run=")).expanduser(), settings)
    schedule = schedule_of(what, settings, given)
    costs = costs_of(settings, schedule.stages)
    timeline = simulate(schedule, costs, gathering=settings.gathering)
    if settings.to:
        draw({what: timeline}, settings)
    if settings.csv:
        write_csv(schedule, Path(settings.csv).expanduser())
    return describe_prediction(what, timeline, costs, settings)


def show_run(run: Path, settings: Settings) -> str:
    """Writes what `words` ask for of what a run measured, and of what its schedule and its costs predict where it wrote them."""
    folder = run / "pipeline"
    measured = read_trace(folder / "trace.json")
    costs, timelines, told = uniform_costs(measured.schedule.stages), {"measured": measured}, []
    if (folder / "schedule.csv").is_file() and (folder / "costs.json").is_file():
        schedule = _checked(read_csv(folder / "schedule.csv"))
        if schedule.rank_of != measured.schedule.rank_of:
            raise ValueError(f"{folder}: trace.json has other stages on its ranks than schedule.csv; measure again")
        costs = read_costs(folder / "costs.json", schedule.stages)
        timelines = {"predicted": simulate(schedule, costs, gathering=settings.gathering), **timelines}
        told = [describe_prediction("predicted", timelines["predicted"], costs, settings), ""]
    if settings.to:
        draw(timelines, settings, "seconds")
    return "\n".join(
        [
            *told,
            *table("measured", measured, costs, settings.gathering, measured.makespan),
            f"makespan {measured.makespan:.6g}, bubble {measured.bubble:.1%}",
        ]
    )


def draw(timelines: dict[str, Timeline], settings: Settings, unit: str = "") -> None:
    """Writes the picture."""
    from rowwise.parallel.pipeline_schedule import gantt  # matplotlib, which takes a second and nothing else needs

    gantt.draw(timelines, Path(settings.to).expanduser(), unit)


def schedule_of(what: str, settings: Settings, given: Collection[str]) -> Schedule:
    """Returns the schedule of that name or in that file. Raises ValueError."""
    if what not in GENERATORS:
        if what.endswith(".csv") or Path(what).is_file():
            _refuse(what, SHAPE & set(given))
            return _checked(read_csv(Path(what).expanduser()))
        near = difflib.get_close_matches(what, GENERATORS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        possible = f"{', '.join(GENERATORS)}, a CSV file, or run=runs/NAME"
        raise ValueError(f"{what or 'nothing'} is no schedule: first comes one of {possible}{hint}")
    if not (settings.ranks and settings.micro_batches):
        raise ValueError(
            f"{what} is made for ranks= and micro_batches=; give {what} ranks=4 micro_batches=12, for example"
        )
    if "unit" in given and what != "blockwise":
        raise ValueError(f"unit={settings.unit}: units are of blockwise; leave it out for {what}")
    chunks = settings.chunks or GENERATORS[what].chunks[0]
    unit = settings.unit or settings.ranks
    return make_schedule(what, Shape(settings.ranks, chunks, settings.micro_batches, unit))


def _checked(schedule: Schedule) -> Schedule:
    check_schedule(schedule, len(schedule.ranks), len(schedule.rank_of), schedule.micro_batches)
    return schedule


def costs_of(settings: Settings, stages: int) -> Costs:
    """Returns the costs of stages that are all alike, as the keys say. Raises ValueError."""
    if settings.forward + settings.input + settings.weight == 0:
        raise ValueError("forward=0 input=0 weight=0: one of them takes time")
    if settings.gather and settings.gathering == "none":
        raise ValueError(
            f"gather={settings.gather:g}: with gathering=none nothing is gathered; give micro_batch or run"
        )
    return uniform_costs(stages, **{key: getattr(settings, key) for key in TIMES})


def read_costs(path: Path, stages: int) -> Costs:
    """Reads the `Costs` in a JSON file, a list of an entry a stage or a number for each field. Raises ValueError."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    names = [field.name for field in fields(Costs)]
    if not isinstance(content, dict) or content.keys() != set(names):
        raise ValueError(f"{path} must hold {', '.join(names)}, and nothing else")
    values: dict[str, Any] = {}
    for field in fields(Costs):
        value, each_stage = content[field.name], field.default is MISSING
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, list) != each_stage or (each_stage and len(numbers) != stages):
            wanted = f"a list of {stages}, one a stage," if each_stage else "a number"
            raise ValueError(f"{path}: {field.name} is not {wanted} but {json.dumps(value)}")
        if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
            raise ValueError(f"{path}: {field.name} has an entry that is no number of at least 0: {json.dumps(value)}")
        values[field.name] = tuple(numbers) if each_stage else value
    if not any((*values["forward"], *values["input"], *values["weight"])):
        raise ValueError(f"{path}: no forward, input or weight takes time")
    return Costs(**values)


def describe_prediction(name: str, timeline: Timeline, costs: Costs, settings: Settings) -> str:
    """Returns the table, and a step in the steady state of a run, with and without waiting for each other's optimizer step."""
    steps = {wait: period(timeline.schedule, costs, wait, settings.gathering) for wait in (True, False)}
    return "\n".join(
        [
            *table(name, timeline, costs, settings.gathering, steps[settings.synchronised][0]),
            f"makespan {timeline.makespan:.6g}",
            *(
                f"{word + ':':<15} a step of {steps[wait][0]:.6g}, bubble {steps[wait][1]:z.1%}"
                for word, wait in (("synchronised", True), ("unsynchronised", False))
            ),
        ]
    )


def table(name: str, timeline: Timeline, costs: Costs, gathering: Gathering, seconds: float) -> list[str]:
    """Returns a line a rank: its stages, the most activations it holds at once (a micro-batch on a stage is 1, or what `costs`
    says), the share of `seconds` in which it works, its gathers."""
    schedule = timeline.schedule
    rows = [("rank", "stages", "activations", "busy", "gathers")]
    for rank, actions in enumerate(schedule.ranks):
        stages = ",".join(map(str, schedule.stages_of(rank)))
        busy = (sum(timeline.ends[rank]) - sum(timeline.starts[rank])) / seconds
        peak = peak_activations(actions, costs)
        rows.append((str(rank), stages, f"{peak:.6g}", f"{busy:.1%}", str(len(gathers(actions, gathering)))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = f"{name}: {len(schedule.ranks)} ranks, {schedule.stages} stages, {schedule.micro_batches} micro-batches"
    return [title, *("  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` arguments, strictly, each as its key's type. Raises ValueError."""
    readers: dict[type, Callable[[str, str], Any]] = {int: _count, float: _time, bool: _flag, str: lambda _, text: text}
    defaults = {field.name: field.default for field in fields(Settings)}
    given: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown key {key}: possible are {', '.join(defaults)}{hint}")
        if not value or key in given:
            raise ValueError(f"{word}: give {key}=VALUE, once")
        given[key] = readers[type(defaults[key])](key, value)
    if given.get("gathering", "none") not in get_args(Gathering):
        raise ValueError(f"gathering={given['gathering']}: possible are {', '.join(get_args(Gathering))}")
    return given


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key}={text}: give a whole number of at least 1")
    return int(text)


def _time(key: str, text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not 0 <= time < math.inf:
        raise ValueError(f"{key}={text}: give a time of at least 0, such as 1.5")
    return time


def _flag(key: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{key}={text}: give true or false")
    return text == "true"


def _refuse(what: str, keys: Collection[str]) -> None:
    if keys:
        raise ValueError(f"{what} leaves no choice of {', '.join(sorted(keys))}; leave out what it says itself")


if __name__ == "__main__":
    sys.exit(main())
