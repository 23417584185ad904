"""What the runs are, and where they stand."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rowwise.launch.pages.draw import Form, name_of
from rowwise.launch.pages.markup import Marked, duration, facts, loss, paragraph, rate, short, size, table, text
from rowwise.launch.pages.records import Run
from rowwise.launch.standing import of_run
from rowwise.trainer.keys import flat
from rowwise.trainer.metrics import number
from rowwise.trainer.starts import Start

FIELDS = frozenset({"step", "tokens"})
DEGREES = ("pipeline", "replicate", "shard", "ring", "ulysses")
OWN = ("name", "run_dir")  # differ in any two runs
ABREAST = 7  # runs that stand side by side as columns; more are rows


def show(runs: Sequence[Run]) -> list[str]:
    """Shows one run: what is known of it beside its state, which stands on top. Several: where each stands, with the settings in
    which they differ."""
    if len(runs) == 1:
        found = [(fact.name, " ".join(filter(None, fact[1:]))) for fact in standing(runs[0]) if fact.value]
        return [facts([*found, *identity(runs[0]), *origin(runs[0])])]
    keys, measured = differences(runs), [standing(run) for run in runs]
    names = [f"{fact.name} ({fact.unit})" if fact.unit else fact.name for fact in measured[0]]
    head = ["run", "state", *names, "parameters", *map(_breakable, keys)]
    rows = [
        [
            name_of(run), of_run(run.folder).state, *(f"{fact.value} {fact.at}".strip() or "-" for fact in numbers), _parameters(run),
            *(_setting(run, key) for key in keys),
        ]
        for run, numbers in zip(runs, measured, strict=True)
    ]  # fmt: skip
    if len(runs) <= ABREAST:
        head, *rows = map(list, zip(head, *rows, strict=True))
    told = "" if keys else "<p>The runs have the same settings.</p>"
    return [table("Where the runs stand, and the settings in which they differ", head, rows), told]


def identity(run: Run) -> list[tuple[str, str]]:
    """Returns what the configuration says; of a run that failed before it wrote one, only where it is."""
    if not run.config:
        return [("folder", str(run.folder))]
    sparsity = run.setting("sparsity.name") or "none"
    density, lr = run.setting("sparsity.density"), number(run.setting("optim.lr"))
    learning = ("optim.name", "schedule.name")
    return [
        ("folder", str(run.folder)),
        ("model", f"{_setting(run, 'model.name')}, {_parameters(run)} parameters"),
        (
            "data",
            f"{_setting(run, 'data.name')}, {run.setting('batch.global_size')} x {run.setting('batch.seq_len')} tokens a step",
        ),
        ("layout", layout(run)),
        ("precision", _setting(run, "precision.name")),
        ("optimizer", f", lr {'-' if lr is None else rate(lr)}, ".join(_setting(run, key) for key in learning)),
        ("sparsity", sparsity if density is None else f"{sparsity}, density {density}"),
    ]


class Fact(NamedTuple):
    """What is known of a run under a name; no value where it is not. `at`: the step, where that is not the last."""

    name: str
    value: str
    unit: str = ""
    at: str = ""


def standing(run: Run) -> list[Fact]:
    """Says how far a run is, in numbers."""
    return [
        Fact("step", f"{run.last_step:,} of {run.setting('steps') or '?'}"),
        _last(run, "loss", "loss", loss, "nats per token"),
        _last(run, "held-out loss", "eval_loss", loss, "nats per token"),
        _last(run, "tokens", "tokens", short),
        Fact("speed", _median(run, "tokens_per_second"), "tokens per second per worker"),
        _last(run, "peak memory", "peak_memory_bytes", size, "on rank 0"),
        Fact("time in steps", duration(run.seconds) if run.last_step else ""),
    ]


def origin(run: Run) -> list[tuple[str, Any]]:
    """Says by which command, where, when and with what it was started, and where it went on."""
    if not run.starts:
        return []
    last, first = run.starts[-1], run.starts[0]
    again = [f"after step {start.step:,} ({when(start)}, {start.host})" for start in run.starts[1:] if start.step]
    facts = [
        ("command", Marked(f"<code>{text(last.command)}</code>") if last.command else "-"),
        ("started", f"{when(first)} on {first.host}, {first.workers} x {first.device}"),
        ("resumed", ", ".join(again)),
        ("versions", ", ".join(f"{name} {version}" for name, version in last.versions.items())),
    ]
    return [(key, value) for key, value in facts if value]


def when(start: Start) -> str:
    """Writes a time to the minute, in the zone where it ran."""
    return start.time[:16].replace("T", " ")


def damage(runs: Sequence[Run]) -> list[str]:
    """Returns what is wrong with the records of the runs."""
    return [paragraph(f"{run.label}: {remark}.") for run in runs for remark in run.remarks]


def layout(run: Run) -> str:
    """Returns the degrees that are more than 1."""
    degrees = {key: run.setting(f"parallel.{key}") or 1 for key in DEGREES}
    workers = 1
    for degree in degrees.values():
        workers *= degree
    schedule = f" ({_setting(run, 'parallel.pipeline_schedule')})" if degrees["pipeline"] > 1 else ""
    axes = [f"{key} {n}{schedule if key == 'pipeline' else ''}" for key, n in degrees.items() if n > 1]
    told = [f"{workers} worker{'s' if workers > 1 else ''}", " x ".join(axes), f"ZeRO {_setting(run, 'parallel.zero')}"]
    return ", ".join(filter(None, told))


def differences(runs: Sequence[Run]) -> list[str]:
    """Returns the settings that are not the same in all runs."""
    settings = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in settings for key in tree)
    return [key for key in keys if key not in OWN and any(tree.get(key) != settings[0].get(key) for tree in settings)]


def _setting(run: Run, path: str) -> str:
    value = run.setting(path)
    if isinstance(value, float) and math.isfinite(value):
        return rate(value, 3 if f"{value:.3g}" == f"{value:.6g}" else 6)  # what differs is to look different
    return "-" if value is None else str(value)


def _breakable(key: str) -> Marked:
    """A line may end at its dots and strokes."""
    return Marked(text(key).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _parameters(run: Run) -> str:
    if run.starts:
        return short(run.starts[-1].parameters)
    from rowwise.trainer.models.config import model_of
    from rowwise.trainer.models.decoder import parameter_count  # torch: of runs of an earlier release only

    if run.config.get("model", {}).get("own") is not None:  # code, which no page runs
        return "?"
    try:
        return short(parameter_count(model_of(run.config["model"]))[0])
    except (KeyError, TypeError):  # of another release
        return "?"


def _median(run: Run, field: str) -> str:
    curve = run.curve(field)
    return "" if curve is None else short(float(np.median(curve.known.values)))


def _last(run: Run, name: str, field: str, form: Form, unit: str = "") -> Fact:
    """The last number of a field."""
    curve = run.curve(field)
    if curve is None:
        return Fact(name, "", unit)
    value, step = curve.known.values[-1], int(curve.known.steps[-1])
    return Fact(name, form(value), unit, "" if step == run.last_step else f"at step {step:,}")
