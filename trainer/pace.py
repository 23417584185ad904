"""How fast a run goes: moving means over its last steps, from its records. Needs no torch."""

from collections import deque
from collections.abc import Iterable
from typing import Any

from rowwise.trainer.metrics import number

WINDOW = 50  # steps


class Pace:
    """The speed of the last steps, and the time that is left. The first step of a process, which allocates and compiles, counts
    only while it is alone; evaluations and saves are spread over all steps that were made."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        self._steps = deque[dict[str, Any]](maxlen=WINDOW)
        self.made, self._beside = 0, 0.0
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        if self.made == 1:
            self._steps.clear()
        self.made += 1
        self._steps.append(record)
        self._beside += sum(number(record.get(f"{part}_seconds")) or 0.0 for part in ("eval", "save"))

    def mean(self, key: str) -> float | None:
        """The mean of `key` over the time of the last steps; None where they have no such number."""
        known = [
            (value, seconds)
            for record in self._steps
            if (value := number(record.get(key))) is not None and (seconds := number(record.get("step_seconds")))
        ]
        time = sum(seconds for _, seconds in known)
        return sum(value * seconds for value, seconds in known) / time if time else None

    def seconds_for(self, steps: int) -> float | None:
        """What `steps` more take at this speed; None where no step was timed."""
        known = [seconds for record in self._steps if (seconds := number(record.get("step_seconds"))) is not None]
        if not known:
            return None
        return steps * (sum(known) / len(known) + self._beside / self.made)
