"""What a forked process does about itself, and tells its client with."""

import atexit
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from rowwise.launch.messages import tell

_NAME = 15  # of prctl: what `ps` and `top` show


class Telling:
    """What a forked function tells its client with. One that lasts closes it, so that its client hears where the warm process is
    gone."""

    def __init__(self, client: socket.socket):
        self._client = client

    def __call__(self, value: Any) -> None:
        tell(self._client, {"pid": os.getpid(), "told": value})

    def close(self) -> None:
        self._client.close()


def call_oneself(name: str) -> None:
    """Sets the name under which `ps` and `top` show this process, whose command line is the warm one's."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_NAME, name.encode()[:15], 0, 0, 0)


def use_threads() -> None:
    """Has torch use as many threads as OMP_NUM_THREADS says, which it read when it was imported."""
    import torch

    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(given) > 0:
        torch.set_num_threads(int(given))


def leave_unfinalized() -> Callable[[int], None]:
    """Has this process end, once all else that is called at its end has been, without taking the interpreter down: what libraries have
    forgotten to free would be told then, 60 lines of Triton's alone. Call it before they are imported. Returns what sets the exit
    code, which is 0."""
    codes = [0]

    def leave() -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(codes[-1])

    atexit.register(leave)
    return codes.append
