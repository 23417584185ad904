"""Signals: finish the step, save, and leave."""

import signal
import time
from types import FrameType
from typing import Any

PATIENCE_SECONDS = 2.0


class StopSignals:
    """While entered, the first of `SIGNALS` sets `requested`. SIGUSR1 and SIGUSR2 are what schedulers send some time
    before a limit. More of them change nothing: a cluster's signal often comes twice, from the scheduler and through
    torchrun. A later SIGINT (Ctrl-C again) interrupts at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE_SECONDS:
            raise KeyboardInterrupt
