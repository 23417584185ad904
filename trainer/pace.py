"""How fast a run goes: moving means over its last steps, from its records. Needs no torch."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowwise.trainer.metrics import last_records, number

WINDOW = 50  # steps
RECENT_BYTES = 1 << 21  # of records, thousands of steps, in which evaluations and saves are looked for


class Pace:
    """The speed of the last steps, and the time that is left. The first step of a process, which allocates and compiles, counts
    only while it is alone; evaluations and saves are spread over the steps between them."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        self._steps = deque[dict[str, Any]](maxlen=WINDOW)
        self.made, self._beside = 0, {f"{part}_seconds": _Beside() for part in ("eval", "save")}
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        if self.made == 1:
            self._steps.clear()
        self.made += 1
        self._steps.append(record)
        for name, beside in self._beside.items():
            beside.add(self.made, number(record.get(name)) or 0.0)

    def mean(self, key: str) -> float | None:
        """Returns the mean of `key` over the time of the last steps; None where they have no such number."""
        known = [
            (value, seconds)
            for record in self._steps
            if (value := number(record.get(key))) is not None and (seconds := number(record.get("step_seconds")))
        ]
        time = sum(seconds for _, seconds in known)
        return sum(value * seconds for value, seconds in known) / time if time else None

    def seconds_for(self, steps: int) -> float | None:
        """Returns what `steps` more take at this speed; None where no step was timed."""
        known = [seconds for record in self._steps if (seconds := number(record.get("step_seconds"))) is not None]
        if not known:
            return None
        return steps * (sum(known) / len(known) + sum(one.a_step(self.made) for one in self._beside.values()))


@dataclass
class _Beside:
    """What is done once in many steps: its first and last step, and the seconds it took there and since the first."""

    first: int = 0
    last: int = 0
    seconds_first: float = 0.0
    seconds_since: float = 0.0

    def add(self, step: int, seconds: float) -> None:
        if seconds and not self.first:
            self.first, self.seconds_first = step, seconds
        elif seconds:
            self.seconds_since += seconds
        self.last = step if seconds else self.last

    def a_step(self, made: int) -> float:
        """Seconds of whole intervals over their steps; of one time alone, the interval is what lies on its longer side."""
        if self.last > self.first:
            return self.seconds_since / (self.last - self.first)
        return self.seconds_first / max(self.first, made - self.first) if self.first else 0.0


def recent_pace(run_dir: Path) -> Pace:
    """Returns the pace of a run as its last records tell it, over as many as show how often it evaluates and saves."""
    return Pace(last_records(run_dir, RECENT_BYTES, rooms=(RECENT_BYTES,)))
