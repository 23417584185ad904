"""Rows of files of conversations: JSON lines (as they are, or in gzip or zstd), a list in one JSON file, Parquet, Arrow."""

import codecs
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rowwise.trainer.data.chat.forms import COLUMNS, BadRow
from rowwise.trainer.data.documents import opened, table
from rowwise.trainer.data.kinds import GZIP, ZSTD, Kind, check_conversations

MOST_BYTES = 64 << 20  # of a line
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Row:
    """A row of a file: its line there, or its number in a table, from 1; and its value, or why it has none."""

    number: int
    value: object


def rows_of(path: Path) -> Iterator[Row]:
    """Reads a file row by row. Raises ValueError for a file that cannot be read on; what is wrong with one row alone is its value."""
    kind = check_conversations(path)
    if kind not in (None, GZIP, ZSTD):
        yield from _of_table(path, kind)
        return
    try:
        with opened(path, kind) as file:
            if _first(file) == b"[":
                yield from _of_list(path, file)
            else:
                yield from _of_lines(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read to its end ({str(error).splitlines()[0]}); write it again") from None


def place_of(path: Path, number: int) -> str:
    """Says where a row stands, for a person."""
    return f"{path}, {'line' if check_conversations(path) in (None, GZIP, ZSTD) else 'row'} {number}"


def _first(file: io.BufferedReader) -> bytes:
    """The first byte behind white space and a byte-order mark."""
    return file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _of_lines(file: io.BufferedReader) -> Iterator[Row]:
    number = 0
    while line := file.readline(MOST_BYTES):
        number += 1
        if len(line) == MOST_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield Row(number, BadRow("a line of more than 64 MiB"))
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield Row(number, _parsed(line))


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"the byte 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return BadRow("not JSON", error.msg)
    except RecursionError:
        return BadRow("not JSON", "it is nested too deep")


def _of_list(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    """Each element of the list that the file is; its text is held as a whole."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (at byte {error.start:,}); write it again as UTF-8") from None
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        at = _past_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        try:
            value, at = decoder.raw_decode(text, at)
            at = _past_space(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            line += text.count("\n", counted, error.pos) if isinstance(error, json.JSONDecodeError) else 0
            raise ValueError(
                f"{path}, line {line}: not JSON; a file that begins with [ is one list of conversations to its end"
            ) from None
        yield Row(line, value)
        at += text[at] == ","


def _past_space(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _SPACE:
        at += 1
    return at


def _of_table(path: Path, kind: Kind | None) -> Iterator[Row]:
    import pyarrow as pa

    try:
        schema, batches = table(path, kind, COLUMNS)
        if not set(schema.names) & set(COLUMNS):
            raise ValueError(
                f"{path}: no conversation in its columns ({', '.join(schema.names)[:200]}); possible are messages, conversations, "
                "prompt with completion, instruction with output"
            )
        number = 0
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(number, value)
    except (pa.ArrowException, OSError) as error:
        what = kind.what if kind else "a table"
        raise ValueError(f"{path} cannot be read as {what} ({str(error).splitlines()[0]}); write it again") from None
