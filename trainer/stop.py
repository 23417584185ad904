"""Signals: finish the step, save, and leave."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

# SIGUSR1 and SIGUSR2 are what schedulers send some time before a limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def hearing(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While entered, `receive` gets the signals that ask for a stop."""
    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """The first signal that is received sets `requested`. More of them change nothing: a cluster's signal often comes twice,
    from the scheduler and through torchrun. A later SIGINT (Ctrl-C again) interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PATIENCE_SECONDS:
            raise KeyboardInterrupt
