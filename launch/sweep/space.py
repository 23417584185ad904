"""What a sweep varies: overrides with several values, and the trials that they make.

optim=adamw,adamw8bit          each of these (also choice(adamw, adamw8bit))
model.layers=range(2,9,2)      each of 2, 4, 6, 8
optim.lr=interval(1e-4,1e-2)                a number between (a search only)
optim.lr=tag(log,interval(1e-4,1e-2))       the same, evenly over its logarithm
model.layers=interval(2,8)                  a whole number between, both ends included
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from rowwise.launch.overrides import parse

MOST_VALUES = 10_000  # of a key
MAY_CHANGE = ("nproc=", "parallel.", "parallel=", "checkpoint.", "tracker", "log_every=", "compile=", "report=")


@dataclass(frozen=True)
class Choice:
    """One of these, each as it stands on a command line."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A number from `low` to `high`, both included; whole where both are."""

    low: float
    high: float
    log: bool

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Space:
    """What a sweep varies. `fixed` overrides are every trial's; of `varied` a trial has one value a key."""

    fixed: tuple[str, ...]
    varied: dict[str, Choice | Interval]

    @property
    def lasting(self) -> list[str]:
        """The fixed overrides that a sweep which goes on must agree in. A trial is the same on every layout."""
        return [word for word in self.fixed if not word.lstrip("+~").startswith(MAY_CHANGE)]

    def grid(self) -> Iterator[dict[str, str]]:
        """Yields every combination, the last key varying fastest. Raises ValueError where there are endlessly many."""
        for key, values in self.varied.items():
            if isinstance(values, Interval):
                raise ValueError(
                    f"{key}=interval({values.low},{values.high}) has no list of values; give some, or a search: "
                    "sweep.search=tpe"
                )
        lists = [values.values for values in self.varied.values() if isinstance(values, Choice)]
        for combination in itertools.product(*lists):
            yield dict(zip(self.varied, combination, strict=True))

    def samples(self) -> Iterator[dict[str, str]]:
        """Yields few trials that try every value of every choice, and the ends of every interval."""
        ends = {
            key: values.values if isinstance(values, Choice) else (str(values.low), str(values.high))
            for key, values in self.varied.items()
        }
        first = {key: values[0] for key, values in ends.items()}
        yield first
        for key, values in ends.items():
            for value in values[1:]:
                yield first | {key: value}


def overrides_of(fixed: Sequence[str], settings: dict[str, str]) -> list[str]:
    """Returns the command line of a trial."""
    return [*fixed, *(f"{key}={value}" for key, value in settings.items())]


def parse_space(arguments: Sequence[str]) -> Space:
    """Reads the space of a sweep. Raises ValueError."""
    overrides = [parse(word) for word in arguments]
    fixed: dict[str, str] = {}
    varied: dict[str, Choice | Interval] = {}
    for override in overrides:
        assert override.input_line is not None
        key = override.get_key_element()
        if override.is_sweep_override():
            varied[key] = _values_of(override)
            fixed.pop(key, None)
        else:
            fixed[key] = override.input_line
            varied.pop(key, None)
    return Space(tuple(fixed.values()), varied)


def _values_of(override: Override) -> Choice | Interval:
    key, line = override.get_key_element(), override.input_line
    if isinstance(override.value(), Glob):
        raise ValueError(f"{line}: what lies in a group is not looked up here; give {key}=A,B")
    if override.is_discrete_sweep():
        values = tuple(itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1))
        if not values or len(values) > MOST_VALUES:
            how = f"more than {MOST_VALUES:,} values" if values else "no value; give some"
            raise ValueError(f"{line}: it has {how}, such as {key}=A,B or range(1,4)")
        if len(set(values)) < len(values):
            raise ValueError(f"{line}: a value stands there twice; give each once")
        return Choice(values)
    interval = override.value()
    if not isinstance(interval, IntervalSweep):
        raise ValueError(f"{line}: give {key}=A,B, range(...) or interval(...)")
    assert interval.start is not None and interval.end is not None
    log = "log" in interval.tags
    if not interval.start < interval.end or (log and interval.start <= 0):
        raise ValueError(f"{line}: an interval goes upwards{', and with tag log from above 0' if log else ''}")
    return Interval(interval.start, interval.end, log)
