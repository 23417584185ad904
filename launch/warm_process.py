"""The warm process itself: it imports what workers need, and forks them for its clients, `rowwise.launch.warm`.

It touches no device and starts no thread, which a fork would not survive, and waits for nothing but its clients: the command that
started it, and those that command lends it to (the agents of a search's trials). A client sends {"call": "module:function", ...};
the function is called in a fork, as `function(tell, *arguments)`, and the client hears {"pid"}, {"pid", "told"} for each thing that
it tells, and {"pid", "ended"} with its exit code. Where a client is gone, what it started is asked to stop as by SIGTERM.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import contextlib
import importlib
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rowwise.launch.forked import Telling, call_oneself, leave_unfinalized
from rowwise.launch.imports import uncollected
from rowwise.launch.messages import CLIENT, MESSAGE, NO_MORE, received, tell
from rowwise.trainer.stop import SIGNALS

LEAVING_SECONDS = 60  # that is given to what a client left behind


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
            word, fds, _, _ = socket.recv_fds(client, len(MESSAGE), 1)
            if word == CLIENT:
                self._clients[socket.socket(fileno=fds[0])] = set()
                return None
            asked = received(word, fds)
        except NO_MORE:
            self._forget(client)
            return None
        module, _, name = asked["call"].partition(":")
        self._import_for(module)
        with uncollected():
            for other in asked["needs"]:
                importlib.import_module(other)
            function = getattr(importlib.import_module(module), name)
        # No signal is lost between the fork and the child's own handlers, nor one to its group.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        if (pid := os.fork()) == 0:
            return self._become(client, function, asked)
        with contextlib.suppress(OSError):  # it has done so itself, or has left
            os.setpgid(pid, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        self._clients[client].add(pid)
        self._outlasting |= {pid} if asked["outlasts"] else set()
        tell(client, {"pid": pid})
        return None

    def _import_for(self, module: str) -> None:
        """What is to be there before `module` is called: what comes up to it, or, where it is none of these, all."""
        while self._beforehand and (module in self._beforehand or module not in self._imported):
            self._import_next()

    def _import_next(self) -> None:
        self._imported.append(self._beforehand.pop(0))
        with uncollected():
            importlib.import_module(self._imported[-1])

    def _become(self, client: socket.socket, function: Callable[..., Any], asked: dict[str, Any]) -> Callable[[], None]:
        """In a fork: leaves everything of the warm process behind."""
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
                        tell(client, {"pid": pid, "ended": os.waitstatus_to_exitcode(status)})

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


if __name__ == "__main__":
    end_with = leave_unfinalized()
    call_oneself("rowwise warm")
    try:
        task = Server(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]).serve()
        if task is not None:
            task()
    except SystemExit as end:
        end_with(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException as error:
        traceback.print_exc()
        end_with(130 if isinstance(error, KeyboardInterrupt) else 1)
