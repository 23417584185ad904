"""Lengths as people think of them, in steps, shares of the run, tokens or time: pure functions of words and numbers.

    length = steps | share | tokens | time
    steps  = a whole number                             100   1e3   "100 steps"
    share  = above 0 and below 1, or a percentage       0.1   10%
    tokens = a number, k, M, B or T, and the word       "2e6 tokens"   50Mtokens
    time   = days, hours, minutes, seconds, in order    20min   1h30m   90s   "2 days"

A share is of the run's steps, to the nearest whole step, as the phases of a schedule are; tokens are as many steps as come
nearest. Both are at least one. `1` and `1.0` are one step: all of the run is `100%`. Numbers are read as decimals, so that
0.1 is a tenth. Needs no torch: a length that is none is refused without waiting for it.
"""

import functools
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from rowwise.optim.curves import length as phase_length

Unit = Literal["steps", "share", "tokens", "time"]
EXAMPLES: dict[Unit, str] = {
    "steps": "steps (100)",
    "share": "a share of the run (0.1 or 10%)",
    "tokens": "tokens ('2e6 tokens')",
    "time": "time (20min, 1h30m, 90s)",
}
UNITS: tuple[Unit, ...] = ("steps", "share", "tokens", "time")

MOST = Decimal(10) ** 18  # more than any run has of anything
A_YEAR = 365 * 24 * 3600

_NUMBER = r"((?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_STEPS = re.compile(rf"{_NUMBER}(?:\s*steps?)?", re.IGNORECASE)
_SHARE = re.compile(rf"{_NUMBER}\s*%")
_TOKENS = re.compile(rf"{_NUMBER}\s*([kmbt]?)\s*tokens?", re.IGNORECASE)
_COUNT = re.compile(rf"{_NUMBER}\s*([kmbt]?)(?:\s*tokens?)?", re.IGNORECASE)
_PARTS = ("d|days?", "h|hours?", "m|min|minutes?", "s|sec|seconds?")
_TIME = re.compile(r"\s*".join(rf"(?:{_NUMBER}\s*(?:{part}))?" for part in _PARTS), re.IGNORECASE)
_SECONDS = (24 * 3600, 3600, 60, 1)


@dataclass(frozen=True)
class Length:
    """An amount of one unit; of time, in seconds."""

    amount: Decimal
    unit: Unit


@dataclass(frozen=True)
class RunLength:
    """What lengths are of: a run of so many `steps`, of `step_tokens` tokens each."""

    steps: int
    step_tokens: int

    def in_steps(self, length: Length) -> int:
        """Returns the steps of a length that is not a time."""
        if length.unit == "steps":
            return int(length.amount)
        if length.unit == "share":
            return max(1, phase_length(float(length.amount), None, 0, self.steps))
        assert length.unit == "tokens"
        return max(1, round(length.amount / self.step_tokens))

    def due(self, every: int | float | str, step: int) -> bool:
        """Says whether what comes `every` so often (0: never) comes after this step, by the steps alone: never, by time."""
        length = read_length("every", every)
        return length.unit != "time" and length.amount > 0 and step % self.in_steps(length) == 0


@functools.lru_cache(maxsize=256, typed=True)  # True is no 1
def read_length(key: str, value: int | float | str, units: tuple[Unit, ...] = UNITS) -> Length:
    """Reads what was said for `key`. Raises ValueError where it is no length, or in none of the `units` that are possible."""
    length = parse_length(value)
    if length is None:
        raise ValueError(f"{key}={value}: give {_or([EXAMPLES[unit] for unit in units])}")
    if length.unit not in units:
        raise ValueError(
            f"{key}={value}: it cannot be said in {_name(length.unit)}; give {_or([EXAMPLES[u] for u in units])}"
        )
    return length


def read_count(key: str, value: int | float | str, of: str) -> int:
    """Reads a number of things, such as 2000000, 2e6 or 2M. Raises ValueError where it is not whole, or not above 0."""
    match = None if isinstance(value, bool) else _COUNT.fullmatch(str(value).strip())
    count = None if match is None else _decimal(match[1], _THOUSANDS[match[2].lower()])
    if count is None or count != count.to_integral_value() or count < 1:
        raise ValueError(f"{key}={value}: give a whole number of {of}, such as 2000000, 2e6 or 2M")
    return int(count)


def plain(length: Length, value: int | float | str) -> int | float | str:
    """Writes a length in the one way: steps as a whole number, a share as a number below 1; tokens and time as they were said."""
    if length.unit == "steps":
        return int(length.amount)
    if length.unit == "share" and length.amount < 1:
        return float(length.amount)
    return value


def parse_length(value: int | float | str) -> Length | None:
    """Reads what was said of a length; None where it is none."""
    said = "" if isinstance(value, bool) else str(value).strip()
    if match := _STEPS.fullmatch(said):
        amount = _decimal(match[1])
        if amount is not None and amount == amount.to_integral_value():
            return Length(amount, "steps")
        return Length(amount, "share") if amount is not None and amount < 1 and match[0] == match[1] else None
    if match := _SHARE.fullmatch(said):
        share = _decimal(match[1], Decimal("0.01"))
        return Length(share, "share") if share is not None and 0 < share <= 1 else None
    if match := _TOKENS.fullmatch(said):
        tokens = _decimal(match[1], _THOUSANDS[match[2].lower()])
        return Length(tokens, "tokens") if tokens is not None and tokens >= 1 else None
    match = _TIME.fullmatch(said)
    if match is None:
        return None
    parts = [_decimal(part or "0", seconds) for part, seconds in zip(match.groups(), _SECONDS, strict=True)]
    whole = sum((part for part in parts if part is not None), Decimal(0))
    return Length(whole, "time") if None not in parts and 0 < whole <= A_YEAR else None


def _decimal(number: str, times: int | Decimal = 1) -> Decimal | None:
    """None where it is more than anything can be."""
    try:
        value = Decimal(number.replace("_", ""))
        return value * times if value <= MOST and value * times <= MOST else None
    except InvalidOperation:
        return None


def _name(unit: Unit) -> str:
    return {"steps": "steps", "share": "shares of the run", "tokens": "tokens", "time": "time"}[unit]


def _or(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
