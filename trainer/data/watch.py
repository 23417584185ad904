"""Looks after the files that a run reads, while it reads them.

Corpora of more than `integrity.AT_ONCE_BYTES` are read and compared with their hashes on a thread, shared by the ranks of a
machine, at a bounded rate: 24 GB in the first minute, and the rest as it comes. All files are looked at every few seconds for
a change of size or time. What is found does not stop this rank alone: it goes to all with the numbers of the next step
(`step.RankStatus`).
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rowwise.trainer.data.integrity import META, DataDamaged, Piece

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 2.0
BYTES_A_SECOND = 400e6  # of a machine: half of what a core hashes


@dataclass(frozen=True)
class Facts:
    """What changes with a file: its size, and when it was written; and which one it is on the disk, where disks of a network may
    call the same one otherwise later."""

    inode: int = field(compare=False)
    size: int
    written_ns: int

    @classmethod
    def of(cls, path: Path) -> "Facts":
        facts = path.stat()
        return cls(facts.st_ino, facts.st_size, facts.st_mtime_ns)


class Watch:
    """Checks `pieces` and looks at `files` while entered. `complaint`: the first thing that is wrong, one line; None while
    nothing is. `ours`: whether they are a cache, which may be made anew, and whose mapped files may be replaced by another
    run that does so."""

    def __init__(self, files: Sequence[Path], pieces: Sequence[Piece], ours: bool):
        self.complaint: str | None = None
        self._files = {path: Facts.of(path) for path in files}
        self._pieces, self._read, self._ours = list(pieces), 0, ours
        self._sharers = 1
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._leave.set()
        self._thread.join(PATIENCE_SECONDS)  # a disk may hang, and there is nothing to finish

    def share(self, place: int, sharers: int) -> None:
        """Leaves to the other ranks of this machine their part: of `sharers` with the same files this is the `place`-th."""
        self._pieces, self._sharers = self._pieces[place::sharers], sharers

    def complain(self, what: str) -> None:
        """Keeps the first complaint. A cache loses its record, so that whoever opens it next makes it anew."""
        if self.complaint is not None:
            return
        if self._ours:
            for folder in {path.parent for path in self._files}:
                with contextlib.suppress(OSError):
                    (folder / META).rename(folder / f"damaged.{META}")
            advice = "start the same command again, which makes this cache anew"
        else:
            advice = "give the files as they were, or another name to begin with them as they are"
        self.complaint = f"{what}; {advice}"

    def unread(self) -> str | None:
        """Says what of the content was not compared with its hash; None where all was, or none was to be."""
        whole, left = len(self._pieces), len(self._pieces) - self._read
        if not left or self.complaint is not None:
            return None
        return f"the data's content was compared with its hashes to {self._read / whole:.0%} when the run ended: no damage so far"

    def _run(self) -> None:
        try:
            looked = 0.0
            for piece in self._pieces:
                if self._leave.is_set():
                    return
                began = time.monotonic()
                if began - looked > POLL_SECONDS:
                    self._look()
                    looked = began
                if self._ours and not piece.path.exists():
                    continue  # what is mapped stays
                piece.check()
                self._read += 1
                self._leave.wait(max(0.0, piece.size * self._sharers / BYTES_A_SECOND - (time.monotonic() - began)))
            while not self._leave.wait(POLL_SECONDS):
                self._look()
        except DataDamaged as damage:
            self.complain(str(damage))

    def _look(self) -> None:
        for path, before in self._files.items():
            try:
                now = Facts.of(path)
            except OSError as error:
                if self._ours and isinstance(error, FileNotFoundError):
                    continue  # what is mapped stays
                raise DataDamaged(f"{path} cannot be read any more ({error.strerror})") from None
            if now != before and not (self._ours and now.inode != before.inode):
                size = f": it has {now.size:,} bytes, and had {before.size:,}" if now.size != before.size else ""
                raise DataDamaged(f"{path} has been written to while the run reads it{size}")


class Watches:
    """Several as one."""

    def __init__(self, watches: Sequence["Watch | Watches"]):
        self._watches = watches

    @property
    def complaint(self) -> str | None:
        return next(filter(None, (watch.complaint for watch in self._watches)), None)

    def __enter__(self) -> "Watches":
        for watch in self._watches:
            watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for watch in self._watches:
            watch.__exit__(*error)

    def share(self, place: int, sharers: int) -> None:
        """Leaves to the other ranks of this machine their part of each."""
        for watch in self._watches:
            watch.share(place, sharers)

    def unread(self) -> str | None:
        """Says what the first says that has something to say."""
        return next(filter(None, (watch.unread() for watch in self._watches)), None)
