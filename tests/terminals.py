"""Programs on a terminal of their own, whose screen is looked at."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyte

PATIENCE = 120  # seconds that nothing here takes: it hangs


class Terminal:
    """A terminal of so many columns, and what was written to it so far: as it came, and as a screen."""

    def __init__(self, columns: int, rows: int = 60):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen, self.raw = pyte.Screen(columns, rows), b""
        self._stream = pyte.ByteStream(self.screen)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.master)
        os.close(self.slave)

    def start(self, *program: str, folder: Path, **environment: str) -> subprocess.Popen:
        """A process whose standard streams are this terminal."""
        clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        return subprocess.Popen(
            [sys.executable, *program],
            cwd=folder, stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env={**clean, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def read(self, seconds: float = 0.0) -> None:
        """What is there, or comes within that time."""
        while select.select([self.master], [], [], seconds)[0]:
            data = os.read(self.master, 1 << 16)
            self.raw += data
            self._stream.feed(data)

    def until(self, seen: Callable[[list[str]], bool], processes: Sequence[subprocess.Popen] = ()) -> list[str]:
        """The lines of the screen once `seen` holds of them, or else once all `processes` have ended and left."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = bool(processes) and all(process.poll() is not None for process in processes)
            self.read(0.01)
            if seen(self.lines) or ended:
                return self.lines
            assert time.monotonic() < deadline, "\n".join(self.lines)

    def wait(self, *processes: subprocess.Popen) -> list[str]:
        """The lines of the screen once all have ended."""
        return self.until(lambda lines: False, processes)

    @property
    def lines(self) -> list[str]:
        """The screen, without what is empty at the right and below."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")
