"""Intervals by time, such as `checkpoint.every=20min`. Rank 0's clock decides, at the beginning of a step, what comes after it, and
the step's own message tells all ranks (`step.RankStatus`): they evaluate and save after the same step. Time decides nothing
else, so a run has the numbers that it has without.

The time to the next save begins anew where a run goes on, for what it goes on from was just saved. The time since the last
evaluation is kept with every checkpoint; the hours between two starts are no part of it.
"""

import time
from collections.abc import Mapping
from typing import Any

from rowwise.optim.lengths import read_length
from rowwise.trainer.config import TrainConfig

now = time.monotonic


class Clock:
    """Says when the time has come to evaluate and to save; never, where no time decides, and on other ranks than 0.
    `manifest`: of the checkpoint that the run goes on from."""

    def __init__(self, config: TrainConfig, rank: int, manifest: Mapping[str, Any]):
        self._evaluate, self._save = (
            _seconds(part.every) if rank == 0 else None for part in (config.eval, config.checkpoint)
        )
        self._evaluated = now() - manifest.get("clock", {}).get("evaluated_seconds_ago", 0.0)
        self._saved = now()

    def due(self) -> tuple[bool, bool]:
        """Returns (evaluate, save), after the step that begins."""
        return _has_come(self._evaluate, self._evaluated), _has_come(self._save, self._saved)

    def evaluated(self) -> None:
        self._evaluated = now()

    def saved(self) -> None:
        self._saved = now()

    def kept(self) -> dict[str, Any]:
        """Returns what a manifest keeps of the clock: nothing, where no time decides."""
        return {} if self._evaluate is None else {"clock": {"evaluated_seconds_ago": now() - self._evaluated}}


def _seconds(every: int | float | str) -> float | None:
    length = read_length("every", every)
    return float(length.amount) if length.unit == "time" else None


def _has_come(seconds: float | None, since: float) -> bool:
    return seconds is not None and now() - since >= seconds
