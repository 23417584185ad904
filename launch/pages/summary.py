"""What the runs are, and where they stand."""

from collections.abc import Sequence

from rowwise.launch.pages.draw import name_of
from rowwise.launch.pages.markup import Marked, duration, facts, paragraph, short, table, text
from rowwise.launch.pages.records import Run
from rowwise.trainer.config import flat
from rowwise.trainer.metrics import number
from rowwise.trainer.models.decoder import model_of, parameter_count

FIELDS = frozenset({"step", "tokens"})
DEGREES = ("pipeline", "replicate", "shard", "ring", "ulysses")
OWN = ("name", "run_dir")  # differ in any two runs


def show(runs: Sequence[Run]) -> list[str]:
    """One run: what is known of it. Several: a row each, with the settings in which they differ."""
    if len(runs) == 1:
        return [facts([*identity(runs[0]), *standing(runs[0])])]
    keys = differences(runs)
    head = ["run", *(key for key, _ in standing(runs[0])), "parameters", *keys]
    rows = [
        [name_of(run), *(value for _, value in standing(run)), _parameters(run), *(_setting(run, key) for key in keys)]
        for run in runs
    ]
    told = "" if keys else "<p>The runs have the same settings.</p>"
    return [table("Where the runs stand, and the settings in which they differ", head, rows), told]


def identity(run: Run) -> list[tuple[str, str]]:
    """What the configuration says."""
    sparsity = run.setting("sparsity.name") or "none"
    density, learning = run.setting("sparsity.density"), ("optim.name", "optim.lr", "schedule.name")
    return [
        ("folder", str(run.folder)),
        ("model", f"{_setting(run, 'model.name')}, {_parameters(run)} parameters"),
        (
            "data",
            f"{_setting(run, 'data.name')}, {run.setting('batch.global_size')} x {run.setting('batch.seq_len')} tokens a step",
        ),
        ("layout", layout(run)),
        ("precision", _setting(run, "precision.name")),
        ("optimizer", "{}, lr {}, {}".format(*(_setting(run, key) for key in learning))),
        ("sparsity", sparsity if density is None else f"{sparsity}, density {density}"),
    ]


def standing(run: Run) -> list[tuple[str, str]]:
    """How far it is, in numbers."""
    return [
        ("state", Marked(f'<span class="words">{text(state(run))}</span>')),
        ("step", f"{run.last_step:,} of {run.setting('steps') or '?'}"),
        ("loss", _last(run, "loss")),
        ("held-out loss", _last(run, "eval_loss")),
        ("tokens", _last(run, "tokens", "")),
        ("time in steps", duration(run.seconds)),
    ]


def damage(runs: Sequence[Run]) -> list[str]:
    """What is wrong with the records of the runs."""
    return [paragraph(f"{run.label}: {remark}.") for run in runs for remark in run.remarks]


def state(run: Run) -> str:
    """What the launcher wrote when the run ended; without that, what the records show."""
    try:
        outcome = run.document("outcome.json")
    except ValueError as error:
        return f"not known: {error}"
    if outcome is None:
        steps = number(run.setting("steps"))
        return "complete" if steps is not None and run.last_step >= steps else "under way, or cut off"
    step, reason, told = outcome.get("step"), outcome.get("reason"), str(outcome.get("state"))
    if isinstance(step, int) and told != "complete":
        told += f" at step {step}"
    told += f": {reason}" if reason else ""
    if isinstance(step, int) and run.last_step > step:
        told += f"; the records reach step {run.last_step:,}"
    return told


def layout(run: Run) -> str:
    """The degrees that are more than 1."""
    degrees = {key: run.setting(f"parallel.{key}") or 1 for key in DEGREES}
    workers = 1
    for degree in degrees.values():
        workers *= degree
    schedule = f" ({_setting(run, 'parallel.pipeline_schedule')})" if degrees["pipeline"] > 1 else ""
    axes = [f"{key} {n}{schedule if key == 'pipeline' else ''}" for key, n in degrees.items() if n > 1]
    told = [f"{workers} worker{'s' if workers > 1 else ''}", " x ".join(axes), f"ZeRO {_setting(run, 'parallel.zero')}"]
    return ", ".join(filter(None, told))


def differences(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs."""
    settings = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in settings for key in tree)
    return [key for key in keys if key not in OWN and any(tree.get(key) != settings[0].get(key) for tree in settings)]


def _setting(run: Run, path: str) -> str:
    value = run.setting(path)
    return "-" if value is None else str(value)


def _parameters(run: Run) -> str:
    try:
        return f"{parameter_count(model_of(run.config['model']))[0]:,}"
    except (KeyError, TypeError):  # of another release
        return "?"


def _last(run: Run, field: str, digits: str = ".4f") -> str:
    curve = run.curve(field)
    if curve is None:
        return "-"
    value, step = curve.known.values[-1], int(curve.known.steps[-1])
    told = format(value, digits) if digits else short(value)
    return told if step == run.last_step else f"{told} at step {step:,}"
