"""Documents as text or bytes, out of files: the standard library, text files, Hugging Face dataset folders."""

import glob
import gzip
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rowwise.trainer.data.config import Hf, Stdlib, Text

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
# Not .json: such files of a saved dataset describe it.
_DATASET_ENDINGS = (".parquet", ".arrow", ".jsonl", ".jsonl.gz")


def list_files(config: Stdlib | Text | Hf) -> list[Path]:
    """The files of a source, in a fixed order. Raises ValueError where there are none."""
    if isinstance(config, Stdlib):
        return stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    endings = (".txt", ".md") if isinstance(config, Text) else _DATASET_ENDINGS
    return find_files(config.files, endings)


def stdlib_files(root: Path) -> list[Path]:
    """Every .py file of the standard library but its tests and what was installed beside it."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    if not found:
        raise ValueError(f"data=stdlib: no .py file under {root}; this Python has no library source, give data=text")
    return found


def find_files(files: str | list[str], endings: tuple[str, ...]) -> list[Path]:
    """The files that `files` names, a pattern or a list: a file is itself, a folder all files below it with one of `endings`, anything
    else a glob. Each once, sorted within a pattern. Raises ValueError where a pattern names none."""
    patterns = [files] if isinstance(files, str) else files
    if not any(patterns):
        raise ValueError("data.files is empty; give a path, a folder or a glob, or a list of them")
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings))
            wanted = f"no file in {pattern} ends in {', '.join(endings)}"
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            wanted = f"{pattern} names no file"
        if not matches:
            raise ValueError(f"data.files: {wanted} (looked from {Path.cwd()}); give an existing file, folder or glob")
        found.update(dict.fromkeys(matches))
    return list(found)


def read_documents(path: Path, config: Stdlib | Text | Hf) -> Iterator[bytes]:
    """The documents of one file, as UTF-8 bytes: a text file is one document, a row of a dataset is one."""
    if not isinstance(config, Hf):
        yield path.read_bytes()
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        yield from _json_lines(path, config.column)
    else:
        yield from _columns(path, config.column)


def _json_lines(path: Path, column: str) -> Iterator[bytes]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg}); a file holds one object a line"
                ) from None
            yield _text_of(row, column, f"{path}, line {number}")


def _text_of(row: object, column: str, where: str) -> bytes:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        columns = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise ValueError(f"{where}: no text in column {column!r}; its columns are {columns}; set data.column")
    return row[column].encode()


def _columns(path: Path, column: str) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            schema, batches = file.schema_arrow, lambda: file.iter_batches(columns=[column])
        else:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            schema, batches = reader.schema, lambda: iter(reader)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({str(error).splitlines()[0]})") from None
    if column not in schema.names:
        raise ValueError(f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}; set data.column")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {column!r} holds {kind}, not text; set data.column")
    for batch in batches():
        for value in batch.column(column):
            if value.is_valid:
                yield str(value.as_py()).encode()
