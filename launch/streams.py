"""The standard streams of a run, which goes on whatever becomes of them: their reader may leave (`| head`), they may be closed
(`2>&-`), the terminal may hang up, or a pipe may be full that nobody reads. Needs no torch."""

import collections
import contextlib
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

WAITING = 10_000  # lines that a slow reader may be behind: of more, the oldest go, for the last say how it ended
PATIENCE_SECONDS = 2.0  # at the end, with a reader that takes nothing


class PatientStream:
    """Text that a thread of its own writes to a file descriptor.

    To write never blocks and never raises: where the descriptor takes nothing any more, it is given up.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._fd = stream, stream.fileno()
        self.encoding, self.errors = stream.encoding, stream.errors
        # None of these has a lock that a handler of signals, which prints, could find held by the write that it interrupts.
        self._line, self._left = collections.deque[str](), collections.deque[bytes](maxlen=WAITING)
        self._news = queue.SimpleQueue[None]()
        self._busy, self._gone = False, False
        self._written = 0
        threading.Thread(target=self._work, name="stream", daemon=True).start()

    def write(self, text: str) -> int:
        ends = "\n" in text or "\r" in text  # a TypeError for bytes, which some try first
        self._line.append(text)
        if ends:
            self.flush()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Sends what was written on its way, a line in one piece: other processes write to the same terminal."""
        pieces: list[str] = []
        with contextlib.suppress(IndexError):
            while True:
                pieces.append(self._line.popleft())
        data = "".join(pieces).encode(self.encoding or "utf-8", "backslashreplace")
        if data and not self._gone:
            self._left.append(data)
            if self._news.empty():
                self._news.put(None)

    def drain(self) -> None:
        """Returns when all is written, or when nobody takes it."""
        self.flush()
        seen, since = self._written, time.monotonic()
        while (self._left or self._busy) and not self._gone and time.monotonic() - since < PATIENCE_SECONDS:
            time.sleep(0.002)
            if self._written > seen:
                seen, since = self._written, time.monotonic()

    def isatty(self) -> bool:
        """Says whether the stream is a terminal whose lines can be painted over."""
        return self._stream.isatty() and os.environ.get("TERM") != "dumb"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def _work(self) -> None:
        while True:
            self._news.get()
            self._busy = True
            try:
                while self._left and not self._gone:
                    self._pass_on(self._left.popleft())
            except OSError:
                self._gone = True
            self._busy = False

    def _pass_on(self, data: bytes) -> None:
        while data:
            taken = self._take(data)
            self._written, data = self._written + taken, data[taken:]

    def _take(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # another program that has the same terminal, or pipe, has set it so
            select.select([], [self._fd], [])
            return 0


@contextlib.contextmanager
def patient_streams() -> Iterator[None]:
    """Has what is printed, while entered, never stop or end the program."""
    keep_open()
    before = sys.stdout, sys.stderr
    patient = [_patient(stream) for stream in before]
    sys.stdout, sys.stderr = patient
    try:
        yield
    finally:
        for stream in patient:
            if isinstance(stream, PatientStream):
                stream.drain()
        sys.stdout, sys.stderr = before


def send_to(path: Path) -> None:
    """Appends what this process, and every library in it, says from here on to `path`. Where that cannot be, it says it as before."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)


def _patient(stream: TextIO) -> Any:
    try:
        stream.flush()
        return PatientStream(stream)
    except (OSError, ValueError):  # it is no file: a test's, say
        return stream


def keep_open() -> None:
    """Opens the null device where a standard stream is closed.

    The next file to be opened would be in its place, and what a library prints would go there.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one. What is started from here has its standard streams too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
