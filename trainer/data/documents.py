"""Files by name, and documents out of them: whole files, and rows of datasets."""

import codecs
import glob
import gzip
import io
import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rowwise.trainer.data.kinds import ARROW_STREAM, GZIP, PARQUET, ZSTD, Kind, check_rows
from rowwise.trainer.data.long_lines import LongLine, encoded
from rowwise.trainer.data.pieces import LONG_BYTES, Document, Stretch
from rowwise.trainer.files import want_of_room

_LINE_BYTES = 4 << 20  # of JSON that is parsed at once
_BATCH_BYTES = 4 << 20
_NOT_UTF8 = "not UTF-8 (the byte 0x{:02x}); write it again as UTF-8"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Found:
    """What `data.files` names: `files`, in a fixed order, each once; `passed_over`: how many files of its folders were not
    taken, by the ending of their names."""

    files: tuple[Path, ...] = ()
    passed_over: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Found") -> "Found":
        return Found(tuple(dict.fromkeys(self.files + other.files)), self.passed_over + other.passed_over)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files if path.is_file())


def stdlib_files(root: Path) -> list[Path]:
    """Returns every .py file of the standard library but its tests and what was installed beside it."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    if not found:
        raise ValueError(f"data=stdlib: no .py file under {root}; this Python has no library source, give data=text")
    return found


def find_files(files: str | list[str], endings: tuple[str, ...]) -> Found:
    """Finds the files that `files` names, a pattern or a list: a file is itself, a folder all files below it with one of
    `endings`, anything else a glob. Each once, sorted within a pattern. Raises ValueError where a pattern names none."""
    patterns = [files] if isinstance(files, str) else files
    if not any(patterns):
        raise ValueError("data.files is empty; give a path, a folder or a glob, or a list of them")
    found = Found()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        there = path.rglob("*") if path.is_dir() else _matches(path)
        matches, others = [], Counter[str]()
        for match in sorted(_each_once(p for p in there if p.is_file())):
            if path.is_dir() and not match.name.endswith(endings):
                others[match.suffix or match.name] += 1
            else:
                matches.append(match)
        if not matches:
            wanted = (
                f"no file in {pattern} ends in {', '.join(endings)}" if path.is_dir() else f"{pattern} names no file"
            )
            raise ValueError(f"data.files: {wanted} (looked from {Path.cwd()}); give an existing file, folder or glob")
        found += Found(tuple(matches), others)
    return found


def _matches(pattern: Path) -> Iterator[Path]:
    """What a glob names. Python's own goes through a link to a folder above it again and again."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    place = pattern.parts.index("**")
    rest = pattern.parts[place + 1 :] or ("*",)
    for root in _matches(Path(*pattern.parts[:place])) if place else [Path()]:
        for folder in _folders(root):
            yield from _matches(Path(glob.escape(str(folder)), *rest))


def _folders(root: Path) -> Iterator[Path]:
    """The folder and all below it that are not hidden, also behind links, each once."""
    seen = set()
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder)


def _each_once(paths: Iterable[Path]) -> Iterable[Path]:
    """Of several paths to one file the shortest, and of those the first."""
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        found.setdefault(os.path.realpath(path), path)
    return found.values()


def rows_of(path: Path, column: str, folder: Path) -> Iterator[Document]:
    """Reads the rows of a dataset's file, each a document. Long ones pass through files in `folder`. Raises ValueError."""
    kind = check_rows(path)
    read = _json_lines if kind in (None, GZIP, ZSTD) else _columns
    yield from read(path, kind, column, folder)


def opened(path: Path, kind: Kind | None) -> io.BufferedReader:
    """Opens a file for the bytes that are in it, unpacked. What is damaged raises OSError, EOFError or zlib.error where it is read."""
    if kind == ZSTD:
        import pyarrow as pa

        return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression="zstd")))
    return cast(io.BufferedReader, gzip.open(path)) if kind == GZIP else path.open("rb")


def whole_file(path: Path) -> Document:
    """Takes a file as one document. A byte-order mark at its beginning is none of its text."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begun = file.read(LONG_BYTES)
    mark = len(codecs.BOM_UTF8) if begun.startswith(codecs.BOM_UTF8) else 0
    content = begun[mark:] if size < LONG_BYTES else Stretch(path, mark, size)
    return Document(str(path), content, is_file=True)


def _of_row(where: str, text: bytes | memoryview, folder: Path) -> Document:
    """A row's text, in a file where it is long."""
    if len(text) < LONG_BYTES:
        return Document(where, bytes(text))
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(text)
    return Document(where, Stretch(Path(file.name), 0, len(text), passing=True))


def _json_lines(path: Path, kind: Kind | None, column: str, folder: Path) -> Iterator[Document]:
    number = 0
    try:
        with opened(path, kind) as lines:
            while line := lines.readline(_LINE_BYTES):
                number += 1
                where = f"{path}, line {number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) >= _LINE_BYTES - len(codecs.BOM_UTF8) and not line.endswith(b"\n"):
                    yield _long_line(LongLine(line, lines), where, column, folder)
                elif line.strip():
                    yield _of_row(where, _text_of(_row(line, where), column, where), folder)
    except (OSError, EOFError, zlib.error) as error:
        if want_of_room(error):
            raise
        raise ValueError(
            f"{path} cannot be read as JSON lines beyond line {number} ({error}); write it again, as UTF-8"
        ) from None


def _long_line(line: LongLine, where: str, column: str, folder: Path) -> Document:
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        try:
            there = line.text(column, file.write)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {_NOT_UTF8.format(error.object[error.start])}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}; data=hf takes one object a line, with a text in data.column") from None
        if not there:
            raise ValueError(f"{where}: no text in column {column!r}; set data.column")
        size = file.tell()
    return Document(where, Stretch(Path(file.name), 0, size, passing=True))


def _row(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {_NOT_UTF8.format(line[error.start])}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deep"
        raise ValueError(
            f"{where}: not JSON ({said}); a file of data=hf holds one object a line, plain text is for data=text"
        ) from None


def _text_of(row: object, column: str, where: str) -> bytes:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        columns = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise ValueError(f"{where}: no text in column {column!r}; its columns are {columns[:200]}; set data.column")
    try:
        return encoded(row[column])
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write it again") from None


def _columns(path: Path, kind: Kind | None, column: str, folder: Path) -> Iterator[Document]:
    import pyarrow as pa

    try:
        schema, batches = table(path, kind, (column,))
        if column not in schema.names:
            raise ValueError(
                f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}; set data.column"
            )
        held = schema.field(column).type
        if not (pa.types.is_string(held) or pa.types.is_large_string(held)):
            raise ValueError(f"{path}: column {column!r} holds {held}, not text; set data.column")
        number = 0
        for batch in batches:
            for value in batch.column(column):
                number += 1
                if value.is_valid:
                    yield _of_row(f"{path}, row {number}", memoryview(value.as_buffer()), folder)
    except (pa.ArrowException, OSError) as error:
        if want_of_room(error):
            raise
        what = kind.what if kind else "JSON lines"
        raise ValueError(f"{path} cannot be read as {what} ({str(error).splitlines()[0]}); write it again") from None


def table(path: Path, kind: Kind | None, columns: Sequence[str]) -> tuple[Any, Iterable[Any]]:
    """Returns the schema of a Parquet or Arrow file, and its rows a batch at a time: at least those of `columns` that it has. Raises
    pyarrow's errors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == PARQUET:
        # Not a whole row group at once: pages as they are asked for, and few rows where they are large.
        file = pq.ParquetFile(path, buffer_size=_BATCH_BYTES)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
        rows = min(65_536, max(1, _BATCH_BYTES // max(1, largest)))
        there = [name for name in file.schema_arrow.names if name in columns]
        return file.schema_arrow, file.iter_batches(batch_size=rows, columns=there) if there else ()
    mapped = pa.memory_map(str(path))
    if kind == ARROW_STREAM:
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, stream
    table = pa.ipc.open_file(mapped)
    return table.schema, (table.get_batch(number) for number in range(table.num_record_batches))
