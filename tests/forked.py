"""What tests have a warm process fork."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def tell_oneself(tell: Any, name: str) -> None:
    """The process, who its parent is, and what its environment says."""
    print(f"said by {os.getpid()}", flush=True)
    tell({"pid": os.getpid(), "parent": os.getppid(), name: os.environ.get(name), "argv": len(sys.argv)})


def environment_at_birth(tell: Any) -> None:
    """What others can read of it."""
    tell(Path("/proc/self/environ").read_bytes().decode().split("\0"))


def tell_again(tell: Any, *arguments: Any) -> None:
    tell([*arguments, os.environ.get("LONG_2")])


def leave(tell: Any, code: int) -> None:
    sys.exit(code)


def fail(tell: Any) -> None:
    raise ValueError("of its own making")


def stay(tell: Any) -> None:
    tell(os.getpid())
    tell.close()
    while True:
        time.sleep(0.01)


def say_nothing(tell: Any) -> None:
    while True:
        time.sleep(0.01)


def hold(tell: Any, path: str, saved: str | None = None) -> None:
    """Leaves a word when it is asked to stop, and leaves once `saved` is there; does not otherwise."""

    def asked(number: int, frame: object) -> None:
        Path(path).write_text(signal.Signals(number).name)
        while saved is not None and not Path(saved).exists():
            time.sleep(0.01)
        sys.exit(0)

    signal.signal(signal.SIGTERM, asked)
    tell(os.getpid())
    tell.close()
    while True:
        time.sleep(0.01)
