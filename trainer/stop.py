"""Signals: finish the step, save, and leave; and Ctrl-C, which is answered at once."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# SIGUSR1 and SIGUSR2 are what schedulers send some time before a limit, SIGHUP a terminal that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_SECONDS = 2.0
INTERRUPTED = 130  # the exit code of what Ctrl-C ended, as shells have it

ASKED = "asked to stop: saving after at most one more step; Ctrl-C again ends at once, without saving"
ENDED = "interrupted: ending at once, without saving"


@contextlib.contextmanager
def hearing(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives `receive`, while entered, the signals that ask for a stop, in the main thread, as soon as it is between two
    instructions of Python. Not SIGHUP where it is ignored: who gave `nohup` wants the run to outlive the terminal."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, receive) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def answering(answer: Callable[[int, Callable[[float], bool]], None]) -> Iterator[None]:
    """Calls `answer(number, left)`, while entered, for every signal that has a handler, in a thread of its own: at once,
    also while the main thread is in a product of matrices or waits for another rank, where no handler runs. `left(seconds)`
    waits, and says whether the context was left meanwhile."""
    heard, told = os.pipe()
    left, leave = os.pipe()
    os.set_blocking(told, False)

    def has_left(seconds: float) -> bool:
        return bool(select.select([left], [], [], seconds)[0])

    def listen() -> None:
        # What was heard before the context was left is answered too.
        while heard in select.select([heard, left], [], [])[0]:
            for number in os.read(heard, 64):
                answer(number, has_left)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(leave)
        thread.join()
        for end in (heard, told, left):
            os.close(end)


def end_now(left: Callable[[float], bool]) -> None:
    """Ends the process where the main thread does not get to its KeyboardInterrupt soon: it waits for a rank, say."""
    if not left(PATIENCE_SECONDS):
        os._exit(INTERRUPTED)


class StopRequest:
    """The first signal that is received sets `requested`, and, where it is SIGINT (Ctrl-C), is acknowledged. More of them
    change nothing: a cluster's signal often comes twice, from the scheduler and through torchrun. A later SIGINT (Ctrl-C
    again) ends the process. As a context, it is closed."""

    def __init__(self) -> None:
        self.requested = False
        self._say: Callable[[str], None] | None = None
        self._hearing = contextlib.ExitStack()
        self._since: float | None = None
        self._answered_since: float | None = None

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def hear(self, say: Callable[[str], None]) -> None:
        """Hears signals from here on, until it is closed; they are acknowledged through the `say` that was given last."""
        heard, self._say = self._say is not None, say
        if not heard:
            self._hearing.enter_context(hearing(self._receive))
            self._hearing.enter_context(answering(self._answer))

    def close(self) -> None:
        """Has signals do what they did before."""
        self._hearing.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if _is_again(number, self._since):
            raise KeyboardInterrupt
        self._since = self._since or time.monotonic()

    def _answer(self, number: int, left: Callable[[float], bool]) -> None:
        assert self._say is not None
        if _is_again(number, self._answered_since):
            self._say(ENDED)
            end_now(left)
        elif number == signal.SIGINT and self._answered_since is None:
            self._say(ASKED)
        if number in SIGNALS:
            self._answered_since = self._answered_since or time.monotonic()


def _is_again(number: int, since: float | None) -> bool:
    return number == signal.SIGINT and since is not None and time.monotonic() - since > PATIENCE_SECONDS
