"""A command's way to a warm process, which has imported what workers need, and forks them, so that each begins at once.

    a command, without torch <-- socket --> warm process -- fork --> worker, worker, ..., what they meet in

`rowwise.launch.warm_process` is that process, `rowwise.launch.messages` what they say to each other.
"""

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rowwise.launch.messages import CLIENT, MESSAGE, NO_MORE, received, send
from rowwise.launch.rendezvous import TOKEN

BEFOREHAND = ("rowwise.launch.ranks", "rowwise.launch.worker")  # imported while there is nothing else to do
QUIET = {"OPENBLAS_NUM_THREADS": "1"}  # numpy would start threads when it is imported


class WarmIsGone(RuntimeError):
    """The warm process has ended by itself, or was killed."""

    def __init__(self) -> None:
        super().__init__("the process that forks workers is gone: it was killed, or what it printed says why")


class Unanswered(RuntimeError):
    """A fork ended before it had told what it was asked for."""


@dataclass
class Child:
    """What a warm process forked for this one. `code`: its exit code, once its end was heard of, which was at `ended_at`;
    `sent`: the signals that it got from here."""

    pid: int
    told: list[Any] = field(default_factory=list)
    code: int | None = None
    ended_at: float = math.inf
    sent: set[int] = field(default_factory=set)
    process: psutil.Process | None = None  # which tells it from a later one of the same number

    def __post_init__(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it was short
            self.process = psutil.Process(self.pid)

    def is_there(self) -> bool:
        """Says whether the child runs, also where nobody is left who would tell of its end."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = self.process if self.code is None else None
            return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    @property
    def was_killed(self) -> bool:
        """Whether a signal that is none of ours ended it."""
        return self.code is not None and self.code < 0 and -self.code not in self.sent

    def send_signal(self, number: int) -> None:
        """Sends a signal to it alone, where it is still there."""
        if self.is_there():
            self.sent.add(number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, number: int) -> None:
        """Sends a signal to it and to what it started."""
        if self.is_there():
            self.sent.add(number)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


class Warm:
    """This process's way to a warm one. Start it early: it imports meanwhile. Where it was killed and nothing of it runs any
    more, another takes its place when one is needed."""

    def __init__(self, control: socket.socket | None = None, beforehand: Sequence[str] = BEFOREHAND) -> None:
        self._children: dict[int, Child] = {}
        self._process: subprocess.Popen | None = None
        self._beforehand = beforehand
        if control is not None:
            self._control = control
        else:
            self._begin()

    def _begin(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rowwise.launch.warm_process", str(theirs.fileno()), *self._beforehand],
                pass_fds=[theirs.fileno()], env=_without_token() | QUIET, start_new_session=True,
            )  # fmt: skip

    def _begin_again(self) -> None:
        """Raises WarmIsGone where something of the old one runs, or where it was not killed: a new one would end as it did."""
        if any(child.is_there() for child in self._children.values()):
            raise WarmIsGone
        if self._process is not None and self._process.wait() >= 0:
            raise WarmIsGone
        self._children.clear()
        self._control.close()
        self._begin()

    def lend(self) -> socket.socket:
        """Opens another way to the same process, for a command that this one starts. Raises WarmIsGone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._control, [CLIENT], [theirs.fileno()])
            except NO_MORE:
                self._begin_again()
                socket.send_fds(self._control, [CLIENT], [theirs.fileno()])
        return ours

    def start(
        self,
        call: str,
        *arguments: Any,
        environment: dict[str, str] | None = None,
        logs: tuple[Path, Path] | None = None,
        needs: Sequence[str] = (),
        outlasts: bool = False,
    ) -> Child:
        """Forks `call` in this process's environment and `environment`, once the modules that it `needs` are imported; its streams
        go to `logs` where they are given. One that `outlasts` the others is deaf to the signals that ask for a stop, and killed
        once they have left where this process is gone. Raises WarmIsGone."""
        asked = {
            "call": call,
            "arguments": arguments,
            "environment": {**_without_token(), **(environment or {})},
            "needs": needs,
            "outlasts": outlasts,
            "logs": None if logs is None else [str(path.absolute()) for path in logs],
        }
        try:
            return self._start(asked)
        except WarmIsGone:
            self._begin_again()
            return self._start(asked)

    def _start(self, asked: dict[str, Any]) -> Child:
        with contextlib.suppress(*NO_MORE):  # which is heard below
            send(self._control, asked)
        while True:
            told = self._hear()
            if told.keys() == {"pid"}:
                return self._children[told["pid"]]

    def ask(self, call: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Returns what `call` tells. Raises Unanswered where it ends without, TimeoutError where it does neither in so many
        `seconds` (None: it may take its time), and WarmIsGone."""
        child = self.start(call, *arguments)
        try:
            told = self.told_by(child, seconds)
        except TimeoutError:
            child.end(signal.SIGKILL)
            child.code = -signal.SIGKILL  # whether it heard or not: one that waits for a driver never does
            raise
        self._children.pop(child.pid)  # nobody waits for its end
        return told

    def told_by(self, child: Child, seconds: float | None = None) -> Any:
        """Returns the first thing that it tells. Raises Unanswered where it ends without, TimeoutError, and WarmIsGone."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not child.told:
            if child.code is not None:
                raise Unanswered(f"a process that was forked {ended_by(child.code)}")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"a process that was forked said nothing in {seconds:g} s")
            self.watch(left)
        return child.told[0]

    def watch(self, seconds: float | None) -> None:
        """Waits so long (None: for ever) for news of the children, and no longer than for the first."""
        if select.select([self._control], [], [], seconds)[0]:
            self._hear()

    def _hear(self) -> dict[str, Any]:
        """One message. Raises WarmIsGone."""
        try:
            told = received(*socket.recv_fds(self._control, len(MESSAGE), 1)[:2])
        except NO_MORE:
            raise WarmIsGone from None
        child = self._children.get(told["pid"])
        if child is None or child.code is not None:  # its number is that of one before
            child = self._children[told["pid"]] = Child(told["pid"])
        if "told" in told:
            child.told.append(told["told"])
        if "ended" in told:
            child.code, child.ended_at = told["ended"], time.monotonic()
        return told

    def close(self) -> None:
        """Leaves it, and what it has forked for this one."""
        self._control.close()
        if self._process is not None:
            if all(child.code is not None for child in self._children.values()):
                self._process.kill()  # it may be importing
            self._process.wait()


@contextlib.contextmanager
def warmed(lent: int | None = None, beforehand: Sequence[str] = BEFOREHAND) -> Iterator[Warm]:
    """Keeps a warm process, which is left with the context: one of its own, or the one that `lent` (a file descriptor) leads to."""
    warm = Warm(None if lent is None else socket.socket(fileno=lent), beforehand)
    try:
        yield warm
    finally:
        warm.close()


def _without_token() -> dict[str, str]:
    """The environment of this process for others, whose environment anybody of the user's may read."""
    return {name: value for name, value in os.environ.items() if name != TOKEN}


def ended_by(code: int) -> str:
    """Puts an exit code, below 0 a signal's, in words."""
    if code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}; what it printed says why"
