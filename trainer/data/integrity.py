"""What a corpus folder says of its own files, and whether that is true.

    meta.json   version, dtype, vocab_size, fingerprint, tokens {split: number},
                files {name: {bytes, sha256: [of every 64 MiB]}}, left_out {character: number}, found {what: number},
                sha256 (of the rest of this record)

Sizes are compared when a corpus is opened, and the content of all that takes less than a second; what is larger is read
in the background (`watch.py`).
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rowwise.trainer.files import fingerprint, from_json, to_json, write_whole

META = "meta.json"  # of a folder that is a corpus
SPLITS = ("train", "holdout")
END_OF_DOCUMENT = b"\0end of document\0"  # in what `Record.fingerprint` is a hash of, behind the tokens of each
FILES = tuple(f"{split}.{ending}" for split in SPLITS for ending in ("bin", "documents.npy"))
OF_CONVERSATIONS = tuple(f"{split}.{ending}" for split in SPLITS for ending in ("learned.bin", "origins.npy"))
VERSION = 1
PIECE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
AT_ONCE_BYTES = 256 << 20  # SHA-256 takes 0.4 s for them, on a core with its instructions


class DataDamaged(ValueError):
    """Data is not what it was. The message is one line: which file, what is wrong with it, what to do."""


@dataclass(frozen=True)
class Contents:
    """The contents of one file: its size, and the hash of every piece of it."""

    bytes: int
    sha256: list[str]


@dataclass(frozen=True)
class Record:
    """meta.json. `tokens`: how many, by split; `left_out`: how often characters stood in the text that have no token; `found`: what
    was in the files, and how often, where rows are of several kinds or some were skipped."""

    dtype: str
    vocab_size: int
    fingerprint: str
    tokens: dict[str, int]
    files: dict[str, Contents]
    left_out: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A part of a file that is to have a hash."""

    path: Path
    start: int
    size: int
    sha256: str

    def check(self) -> None:
        """Reads it. Raises DataDamaged."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                found = _hash_of_next(file, self.size)
        except OSError as error:
            raise DataDamaged(f"{self.path} cannot be read ({error.strerror})") from None
        if found != self.sha256:
            raise DataDamaged(
                f"{self.path} is damaged: bytes {self.start:,} to {self.start + self.size:,} do not have the hash that "
                f"{META} beside it holds"
            )


class HashedFile:
    """A file that is being written, hashed on its way there."""

    def __init__(self, path: Path):
        self.bytes = 0
        self._file = path.open("wb")
        self._done: list[str] = []
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        self._file.write(left)
        while len(left):
            now = left[: PIECE_BYTES - self.bytes % PIECE_BYTES]
            self._hash.update(now)
            self.bytes += len(now)
            left = left[len(now) :]
            if self.bytes % PIECE_BYTES == 0:
                self._done.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()

    def close(self) -> Contents:
        """Returns once the disk has it."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self.bytes % PIECE_BYTES:
                self._done.append(self._hash.hexdigest())
        return Contents(self.bytes, self._done)


def write_record(folder: Path, record: Record) -> None:
    """Writes it last: without it the folder is no corpus."""
    tree = {"version": VERSION, **asdict(record)}
    write_whole(folder / META, to_json(tree | {"sha256": fingerprint(tree)}, indent=1))


def read_record(folder: Path) -> Record:
    """Reads the record of a corpus folder. Raises DataDamaged."""
    path, tree = folder / META, read_tree(folder)
    if tree.get("version") != VERSION:
        raise DataDamaged(f"{path} is a record of version {tree.get('version')}, and this release reads {VERSION}")
    if tree.pop("sha256", None) != fingerprint(tree):
        raise DataDamaged(f"{path} is damaged: it does not have the hash that it holds of itself")
    del tree["version"]
    try:
        record = Record(**tree | {"files": {name: Contents(**facts) for name, facts in tree["files"].items()}})
        whole = all(len(facts.sha256) == -(-facts.bytes // PIECE_BYTES) for facts in record.files.values())
        whole &= all(type(count) is int for count in (*record.left_out.values(), *record.found.values()))
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole or set(record.files) not in (
        set(FILES),
        {*FILES, *OF_CONVERSATIONS},
    ):  # as a stranger may have written it
        raise DataDamaged(f"{path} is damaged: it is no record of a corpus")
    return record


def read_tree(folder: Path) -> dict[str, Any]:
    """Reads what stands in the record of a corpus folder, whatever it is. Raises DataDamaged."""
    path = folder / META
    try:
        tree = from_json(path.read_bytes())
    except FileNotFoundError:
        raise DataDamaged(f"{path} is missing, which says what the files beside it hold") from None
    except OSError as error:
        raise DataDamaged(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise DataDamaged(f"{path} is damaged: it is not JSON") from None
    if not isinstance(tree, dict):
        raise DataDamaged(f"{path} is damaged: it is no record of a corpus")
    return tree


def check_folder(folder: Path, record: Record) -> list[Piece]:
    """Compares the sizes of a corpus' files with its record, and the content of those that are soon read. Returns what is
    left to be read. Raises DataDamaged."""
    left: list[Piece] = []
    room = AT_ONCE_BYTES
    for name, facts in sorted(record.files.items(), key=lambda file: file[1].bytes):
        path = folder / name
        if not path.is_file():
            raise DataDamaged(f"{path} is missing")
        if (size := path.stat().st_size) != facts.bytes:
            raise DataDamaged(f"{path} is damaged: it has {size:,} bytes, and {META} beside it says {facts.bytes:,}")
        if facts.bytes > room:
            left += pieces_of(path, facts)
            continue
        room -= facts.bytes
        for piece in pieces_of(path, facts):
            piece.check()
    return left


def pieces_of(path: Path, facts: Contents) -> Iterator[Piece]:
    """Yields the pieces of a file, from its beginning."""
    for number, sha256 in enumerate(facts.sha256):
        start = number * PIECE_BYTES
        yield Piece(path, start, min(PIECE_BYTES, facts.bytes - start), sha256)


def contents_of(path: Path) -> Contents:
    """Returns the contents of a file as it is."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return Contents(size, [_hash_of_next(file, min(PIECE_BYTES, size - at)) for at in range(0, size, PIECE_BYTES)])


def file_fingerprint(path: Path, window: int = 1 << 20) -> str:
    """Returns the SHA-256 of the size and of 64 windows spread over the file (of all of a small one)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(window, size // 64)):
            file.seek(start)
            digest.update(file.read(window))
    return digest.hexdigest()


def _hash_of_next(file: BinaryIO, size: int) -> str:
    content = hashlib.sha256()
    for at in range(0, size, _BLOCK_BYTES):
        content.update(file.read(min(_BLOCK_BYTES, size - at)))
    return content.hexdigest()
