"""Documents as text or bytes, out of files: the standard library, text files, Hugging Face dataset folders."""

import codecs
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowwise.trainer.data.config import DataConfig, Hf, Stdlib, Text
from rowwise.trainer.data.kinds import ARROW_STREAM, GZIP, PARQUET, Kind, check_rows, check_text

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
# Not .json: such files of a saved dataset describe it.
_DATASET_ENDINGS = (".parquet", ".arrow", ".jsonl", ".jsonl.gz")


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


def list_files(config: Stdlib | Text | Hf) -> Found:
    """The files of a source, in a fixed order. Raises ValueError where there are none."""
    if isinstance(config, Stdlib):
        return Found(tuple(stdlib_files(Path(sysconfig.get_paths()["stdlib"]))))
    return find_files(config.files, endings_of(config))


def endings_of(config: DataConfig) -> tuple[str, ...]:
    """The files that a source takes out of a folder."""
    return {"text": (".txt", ".md"), "hf": _DATASET_ENDINGS, "tokens": (".bin", ".npy"), "stdlib": (".py",)}[
        config.name
    ]


def stdlib_files(root: Path) -> list[Path]:
    """Every .py file of the standard library but its tests and what was installed beside it."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    if not found:
        raise ValueError(f"data=stdlib: no .py file under {root}; this Python has no library source, give data=text")
    return found


def find_files(files: str | list[str], endings: tuple[str, ...]) -> Found:
    """The files that `files` names, a pattern or a list: a file is itself, a folder all files below it with one of `endings`, anything
    else a glob. Each once, sorted within a pattern. Raises ValueError where a pattern names none."""
    patterns = [files] if isinstance(files, str) else files
    if not any(patterns):
        raise ValueError("data.files is empty; give a path, a folder or a glob, or a list of them")
    found = Found()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        there = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        matches, others = [], Counter[str]()
        for match in sorted(p for p in there if p.is_file()):
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


def check_files(files: Iterable[Path], config: Stdlib | Text | Hf) -> None:
    """Refuses files that are of another kind than the source reads. Raises ValueError."""
    check = check_rows if isinstance(config, Hf) else check_text
    for path in files if not isinstance(config, Stdlib) else ():
        check(path)


def read_documents(path: Path, config: Stdlib | Text | Hf) -> Iterator[bytes]:
    """The documents of one file, as UTF-8 bytes: a text file is one document, a row of a dataset is one. A byte-order mark
    at the beginning of a file is none of its text."""
    if not isinstance(config, Hf):
        yield path.read_bytes().removeprefix(codecs.BOM_UTF8)
        return
    kind = check_rows(path)
    yield from _json_lines(path, kind, config.column) if kind in (None, GZIP) else _columns(path, kind, config.column)


def _json_lines(path: Path, kind: Kind | None, column: str) -> Iterator[bytes]:
    try:
        with (gzip.open if kind == GZIP else open)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(_row(line, f"{path}, line {number}"), column, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON lines ({error}); write it again, as UTF-8") from None


def _row(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg}); a file of data=hf holds one object a line, plain text is for data=text"
        ) from None


def _text_of(row: object, column: str, where: str) -> bytes:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        columns = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise ValueError(f"{where}: no text in column {column!r}; its columns are {columns}; set data.column")
    return row[column].encode()


def _columns(path: Path, kind: Kind | None, column: str) -> Iterator[bytes]:
    import pyarrow as pa

    try:
        schema, batches = _table(path, kind, column)
        if column not in schema.names:
            raise ValueError(
                f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}; set data.column"
            )
        held = schema.field(column).type
        if not (pa.types.is_string(held) or pa.types.is_large_string(held)):
            raise ValueError(f"{path}: column {column!r} holds {held}, not text; set data.column")
        for batch in batches:
            for value in batch.column(column):
                if value.is_valid:
                    yield str(value.as_py()).encode()
    except (pa.ArrowException, OSError) as error:
        what = kind.what if kind else "JSON lines"
        raise ValueError(f"{path} cannot be read as {what} ({str(error).splitlines()[0]}); write it again") from None


def _table(path: Path, kind: Kind | None, column: str) -> tuple[Any, Iterable[Any]]:
    """The schema of a file, and its rows a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == PARQUET:
        file = pq.ParquetFile(path)
        there = column in file.schema_arrow.names
        return file.schema_arrow, file.iter_batches(columns=[column]) if there else ()
    mapped = pa.memory_map(str(path))
    if kind == ARROW_STREAM:
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, stream
    table = pa.ipc.open_file(mapped)
    return table.schema, (table.get_batch(number) for number in range(table.num_record_batches))
