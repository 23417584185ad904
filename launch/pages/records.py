"""A run's folder, read for a page: metrics.jsonl as curves, config.yaml, and the files beside them.

metrics.jsonl is read line by line. A number costs 16 bytes: a million records of 11 numbers become a page of 0.2 MB in 15
seconds and 0.7 GB. Of what is no number but a table of numbers (by layer, say) at most 1,000 records are held, evenly
spaced.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rowwise.launch.outcome import OUTCOME
from rowwise.trainer.files import from_json
from rowwise.trainer.keys import without_password
from rowwise.trainer.metrics import number, record_of, spans
from rowwise.trainer.starts import Start, read_starts

DEEP = 20  # of a tree in a record, at most
POINTS = 1000  # of a curve in a picture, at most; records of a table
WHOLE_STEP = ("step_seconds", "eval_seconds", "save_seconds")  # the first ends before the others begin


@dataclass(frozen=True)
class Curve:
    """A number over steps; NaN where it was null: an overflow has no loss, nor has a step without valid tokens."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def known(self) -> "Curve":
        """Where the curve is a number."""
        here = np.isfinite(self.values)
        return Curve(self.steps[here], self.values[here])

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Returns its values at these steps of its run, 0 where there is none."""
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, self.steps)] = np.nan_to_num(self.values)
        return values


@dataclass
class Tables:
    """A field that has a table of numbers in each record, by name: the `last` (step, table), and of all of them evenly
    spaced ones."""

    kept: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    last: tuple[int, dict[str, float]] = (0, {})
    _seen: int = 0
    _stride: int = 1

    def add(self, step: int, table: dict[str, float]) -> None:
        self.last = (step, table)
        if self._seen % self._stride == 0:
            self.kept.append(self.last)
            if len(self.kept) > POINTS:
                self.kept, self._stride = self.kept[::2], 2 * self._stride
        self._seen += 1


@dataclass(frozen=True)
class Run:
    """A run as it is on disk now. `order`: its place among the runs of the page, which is its colour; `label`: its name
    there. `curves` and `tables`: the fields of metrics.jsonl."""

    order: int
    label: str
    folder: Path
    config: dict[str, Any]
    config_text: str
    curves: dict[str, Curve]
    tables: dict[str, Tables]
    remarks: tuple[str, ...] = ()  # what is wrong with its files
    starts: tuple[Start, ...] = ()

    @property
    def steps(self) -> np.ndarray:
        return self.curves["step"].steps if "step" in self.curves else np.zeros(0)

    @property
    def last_step(self) -> int:
        """The last step; 0 where the run ended before its first."""
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def resumed(self) -> list[int]:
        """The steps after which a start went on."""
        return sorted({start.step for start in self.starts if 0 < start.step < self.last_step})

    @property
    def seconds(self) -> float:
        """The seconds of all steps, with evaluations and saves; what lay between a stop and a resume is not counted."""
        return sum(self.total(name) for name in WHOLE_STEP)

    def curve(self, name: str) -> Curve | None:
        """Returns the curve of a field; None where no record has a number of that name."""
        curve = self.curves.get(name)
        return curve if curve is not None and len(curve.known.steps) else None

    def on_steps(self, name: str) -> np.ndarray:
        """Returns the field at every step, 0 where it is absent."""
        return self.curves[name].at(self.steps) if name in self.curves else np.zeros(len(self.steps))

    def total(self, name: str) -> float:
        return float(self.on_steps(name).sum())

    def setting(self, path: str) -> Any:
        """Returns a key of the configuration, such as `optim.lr`; None where there is none."""
        node: Any = self.config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def document(self, name: str) -> dict[str, Any] | None:
        """Returns a JSON file of the run's folder; None where there is none. Raises ValueError for what is no JSON object."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            content = from_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no JSON object")
        return content


def read_run(folder: Path, order: int, label: str) -> Run:
    """Reads the run in `folder`. Raises ValueError where there is none, or none with records."""
    metrics, settings = folder / "metrics.jsonl", folder / "config.yaml"
    if not any(path.is_file() for path in (metrics, settings, folder / OUTCOME)):
        raise ValueError(f"run={folder}: there is no run; give a folder that rowwise.launch.train wrote, runs/NAME")
    curves, tables, bad = read_fields(metrics)
    if not curves and not (folder / OUTCOME).is_file():  # one that failed before its first step says why
        lost = f"; none is in line {spans(bad)} of {metrics}" if bad else ""
        raise ValueError(f"run={folder}: the run has no records yet; wait for its first step{lost}")
    text = settings.read_text(errors="replace") if settings.is_file() else ""
    remarks = (
        (f"metrics.jsonl has no record of a later step in line {spans(bad)}, which is passed over",) if bad else ()
    )
    tree, shown = _tree(text, settings), without_password(text)
    return Run(order, label, folder, tree, shown, curves, tables, remarks, tuple(read_starts(folder)))


def _tree(text: str, path: Path) -> dict[str, Any]:
    """A configuration. A run writes none with aliases, and a few lines of them are a tree that no memory holds."""
    try:
        aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader))
        tree: Any = None if aliases else OmegaConf.to_container(OmegaConf.create(text or "{}"))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no configuration; the run writes it again when it is resumed")
    return tree


def read_fields(path: Path) -> tuple[dict[str, Curve], dict[str, Tables], list[int]]:
    """Reads the fields of metrics.jsonl that hold numbers or tables of numbers; and the lines that are no records, or of a step
    that has been."""
    columns: dict[str, tuple[array, array]] = {}
    tables: dict[str, Tables] = {}
    bad: list[int] = []
    for record in _records(path, bad):
        step = record["step"]
        for name, value in record.items():
            if value is None or isinstance(value, int | float):
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(math.nan if (known := number(value)) is None else known)
            elif table := dict(leaves(value)):
                tables.setdefault(name, Tables()).add(step, table)
    curves = {name: Curve(np.frombuffer(steps), np.frombuffer(values)) for name, (steps, values) in columns.items()}
    return curves, tables, bad


def _records(path: Path, bad: list[int]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    before = 0
    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # being written, or cut off
            record = record_of(line)
            if record is None or record["step"] <= before:
                bad.append(at)
                continue
            before = record["step"]
            yield record


def leaves(value: Any, name: str = "", deep: int = DEEP) -> Iterator[tuple[str, float]]:
    """Yields the numbers in lists and dicts, by their path: {"a": [1, 2]} has a.0 and a.1. What lies deeper than `deep` is left."""
    if name and (known := number(value)) is not None:
        yield name, known
    elif isinstance(value, dict | list) and deep:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from leaves(inner, f"{name}.{key}" if name else str(key), deep - 1)


def thin(curve: Curve, points: int = POINTS) -> Curve:
    """Returns at most `points` of a curve: of each of `points` / 2 stretches of equally many records the least and the largest, in
    their order, so that no extreme is lost. A stretch without a number stays a gap. Takes one pass."""
    if len(curve.steps) <= points:
        return curve
    chosen: list[int] = []
    for stretch in np.array_split(np.arange(len(curve.steps)), points // 2):
        values = curve.values[stretch]
        if np.isnan(values).all():
            chosen.append(stretch[0])
        else:
            chosen += sorted({int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])})
    return Curve(curve.steps[chosen], curve.values[chosen])


def smooth(curve: Curve) -> Curve:
    """Returns means over a window of a fiftieth of the curve around each record; a gap stays one, and counts in no mean."""
    here, half = ~np.isnan(curve.values), len(curve.values) // 100
    sums = np.concatenate([[0.0], np.cumsum(np.where(here, curve.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(here)])
    places = np.arange(len(here))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(here))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return Curve(curve.steps, np.where(here, means, np.nan))


def stretches(steps: np.ndarray, series: Sequence[np.ndarray], most: int = 80) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns means of each series over at most `most` stretches of equally many steps, and the edges between them."""
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    edges = np.array([steps[part[0]] - 0.5 for part in parts] + [steps[-1] + 0.5])
    return edges, [np.array([values[part].mean() for part in parts]) for values in series]
