"""A warm process: it has imported what workers need, and forks them, so that each begins at once.

    a command, without torch <-- socket --> warm process -- fork --> worker, worker, ..., what they meet in

It touches no device and starts no thread, which a fork would not survive, and waits for nothing but its clients: the command that
started it, and those that command lends it to (the agents of a search's trials). Messages are JSON of any length, each in a file
in memory whose descriptor is sent. A client sends {"call": "module:function", ...};
the function is called in a fork, as `function(tell, *arguments)`, and the client hears {"pid"}, {"pid", "told"} for each thing that
it tells, and {"pid", "ended"} with its exit code. Where a client is gone, what it started is asked to stop as by SIGTERM.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rowwise.launch.rendezvous import TOKEN
from rowwise.trainer.stop import SIGNALS

BEFOREHAND = ("rowwise.launch.ranks", "rowwise.launch.worker")  # imported while there is nothing else to do
QUIET = {"OPENBLAS_NUM_THREADS": "1"}  # numpy would start threads when it is imported
LEAVING_SECONDS = 60  # that is given to what a client left behind
_MESSAGE, _CLIENT = b"message", b"client"  # what a file descriptor that is sent leads to
_NAME = 15  # of prctl: what `ps` and `top` show
_NO_MORE = (BrokenPipeError, ConnectionResetError)


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
                [sys.executable, "-P", "-m", "rowwise.launch.warm", str(theirs.fileno()), *self._beforehand],
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
                socket.send_fds(self._control, [_CLIENT], [theirs.fileno()])
            except _NO_MORE:
                self._begin_again()
                socket.send_fds(self._control, [_CLIENT], [theirs.fileno()])
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
        with contextlib.suppress(*_NO_MORE):  # which is heard below
            _send(self._control, asked)
        while True:
            told = self._hear()
            if told.keys() == {"pid"}:
                return self._children[told["pid"]]

    def ask(self, call: str, *arguments: Any) -> Any:
        """Returns what `call` tells. Raises Unanswered where it ends without, and WarmIsGone."""
        child = self.start(call, *arguments)
        told = self.told_by(child)
        self._children.pop(child.pid)  # nobody waits for its end
        return told

    def told_by(self, child: Child) -> Any:
        """Returns the first thing that it tells. Raises Unanswered where it ends without, and WarmIsGone."""
        while not child.told:
            if child.code is not None:
                raise Unanswered(f"a process that was forked {ended_by(child.code)}")
            self._hear()
        return child.told[0]

    def watch(self, seconds: float) -> None:
        """Waits so long for news of the children, and no longer than for the first."""
        if select.select([self._control], [], [], seconds)[0]:
            self._hear()

    def _hear(self) -> dict[str, Any]:
        """One message. Raises WarmIsGone."""
        try:
            told = _received(*socket.recv_fds(self._control, len(_MESSAGE), 1)[:2])
        except _NO_MORE:
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


class Server:
    """The warm process itself."""

    def __init__(self, control: socket.socket, beforehand: Sequence[str]):
        self._clients: dict[socket.socket, set[int]] = {control: set()}
        self._left: dict[int, float] = {}  # children without a client, and until when they may stay
        self._outlasting: set[int] = set()
        self._needed: dict[int, set[int]] = {}  # those of them that outlast others, and which
        self._beforehand, self._imported = list(beforehand), list[str]()
        self._woken, told = os.pipe()
        for end in (self._woken, told):
            os.set_blocking(end, False)
        self._before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def serve(self) -> Callable[[], None] | None:
        """Serves until nobody is there. In a fork: returns what it is to do."""
        while self._clients or self._left:
            waiting = 0.0 if self._beforehand else 1.0 if self._left else None
            ends: list[socket.socket | int] = [*self._clients, self._woken]
            heard = select.select(ends, [], [], waiting)[0]
            if not heard and self._beforehand:
                self._import_next()
            if self._woken in heard:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
            self._bury()
            for client in [one for one in heard if isinstance(one, socket.socket)]:
                if (task := self._answer(client)) is not None:
                    return task
        return None

    def _answer(self, client: socket.socket) -> Callable[[], None] | None:
        try:
            word, fds, _, _ = socket.recv_fds(client, len(_MESSAGE), 1)
            if word == _CLIENT:
                self._clients[socket.socket(fileno=fds[0])] = set()
                return None
            asked = _received(word, fds)
        except _NO_MORE:
            self._forget(client)
            return None
        module, _, name = asked["call"].partition(":")
        self._import_for(module)
        for other in asked["needs"]:
            importlib.import_module(other)
        function = getattr(importlib.import_module(module), name)
        gc.freeze()  # nobody looks for rubbish among what was imported
        # No signal is lost between the fork and the child's own handlers, nor one to its group.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        if (pid := os.fork()) == 0:
            return self._become(client, function, asked)
        with contextlib.suppress(OSError):  # it has done so itself, or has left
            os.setpgid(pid, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        self._clients[client].add(pid)
        self._outlasting |= {pid} if asked["outlasts"] else set()
        _tell(client, {"pid": pid})
        return None

    def _import_for(self, module: str) -> None:
        """What is to be there before `module` is called: what comes up to it, or, where it is none of these, all."""
        while self._beforehand and (module in self._beforehand or module not in self._imported):
            self._import_next()

    def _import_next(self) -> None:
        self._imported.append(self._beforehand.pop(0))
        importlib.import_module(self._imported[-1])

    def _become(self, client: socket.socket, function: Callable[..., Any], asked: dict[str, Any]) -> Callable[[], None]:
        """In a fork: leaves everything of the warm process behind."""
        gc.enable()
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            if number not in SIGNALS or not asked["outlasts"]:
                signal.signal(number, handler)
        os.setpgid(0, 0)
        for other in self._clients.keys() - {client}:
            other.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        os.environ.clear()
        os.environ.update(asked["environment"])
        for stream, path in zip((1, 2), asked["logs"] or (), strict=False):
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, stream)
            os.close(log)
        return lambda: function(Telling(client), *asked["arguments"])

    def _bury(self) -> None:
        """Tells of the children that have ended, and ends those that nobody waits for any more."""
        for pid, until in self._left.items():
            if time.monotonic() > until:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                self._left.pop(pid, None)
                self._outlasting.discard(pid)
                for client, children in self._clients.items():
                    if pid in children:
                        children.remove(pid)
                        _tell(client, {"pid": pid, "ended": os.waitstatus_to_exitcode(status)})

        for pid, others in list(self._needed.items()):
            if not others & self._left.keys():
                del self._needed[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def _forget(self, client: socket.socket) -> None:
        children = self._clients.pop(client)
        self._needed |= dict.fromkeys(children & self._outlasting, children - self._outlasting)
        for pid in children:
            self._left[pid] = time.monotonic() + LEAVING_SECONDS
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
        client.close()


class Telling:
    """What a forked function tells its client with. One that lasts closes it, so that its client hears where the warm process is
    gone."""

    def __init__(self, client: socket.socket):
        self._client = client

    def __call__(self, value: Any) -> None:
        _tell(self._client, {"pid": os.getpid(), "told": value})

    def close(self) -> None:
        self._client.close()


def _tell(client: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(*_NO_MORE):
        _send(client, message)


def _send(to: socket.socket, message: dict[str, Any]) -> None:
    """Not through the socket itself, which takes 200 kB at most: an environment and a list of files are more."""
    with os.fdopen(os.memfd_create("message"), "wb") as file:
        file.write(json.dumps(message).encode())
        file.flush()
        socket.send_fds(to, [_MESSAGE], [file.fileno()])


def _received(word: bytes, fds: list[int]) -> dict[str, Any]:
    """Raises ConnectionResetError where nobody is there to send."""
    if not word:
        raise ConnectionResetError
    with os.fdopen(fds[0], "rb") as file:
        file.seek(0)
        return json.load(file)


def _without_token() -> dict[str, str]:
    """The environment of this process for others, whose environment anybody of the user's may read."""
    return {name: value for name, value in os.environ.items() if name != TOKEN}


def ended_by(code: int) -> str:
    """Puts an exit code, below 0 a signal's, in words."""
    if code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}; what it printed says why"


def call_oneself(name: str) -> None:
    """Sets the name under which `ps` and `top` show this process, whose command line is the warm one's."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_NAME, name.encode()[:15], 0, 0, 0)


def use_threads() -> None:
    """Has torch use as many threads as OMP_NUM_THREADS says, which it read when it was imported."""
    import torch

    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(given) > 0:
        torch.set_num_threads(int(given))


if __name__ == "__main__":
    call_oneself("rowwise warm")
    gc.disable()  # which takes a tenth of the imports, and finds nothing
    task = Server(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]).serve()
    if task is not None:
        task()
