"""Documents in pieces that memory holds: what is tokenized at once, and where a long text is cut.

A document of more than 256 KiB is tokenized in pieces of at most that, cut after the last line break that stands between
two characters that are no white space: there byte-level tokenizers (GPT-2's, Llama 3's, Qwen's) cut too, so that the tokens are
those of the whole. Where there is none it is cut after another line break, after a space, or between two
characters; and a tokenizer that puts a mark before every text (SentencePiece's leading space) puts it before every piece.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 256 << 10
LONG_BYTES = 256 << 10  # from here on a document is left in its file, and its end may be held out


@dataclass(frozen=True)
class Stretch:
    """Bytes `start` to `stop` of a file. `passing`: it is removed once it was read."""

    path: Path
    start: int
    stop: int
    passing: bool = False


@dataclass(frozen=True)
class Document:
    """A text, and where it came from: a file (`is_file`), or a line or row of one."""

    where: str
    content: bytes | Stretch
    is_file: bool = False

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stop - self.content.start

    def read(self, start: int, stop: int) -> bytes:
        """Reads bytes `start` to `stop` of the text. Raises ValueError where the file has become shorter."""
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with self.content.path.open("rb") as file:
            file.seek(self.content.start + start)
            found = file.read(stop - start)
        if len(found) < stop - start:
            raise ValueError(
                f"{self.content.path} became shorter while it was read; start again once it stays as it is"
            )
        return found

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields bytes `start` to `stop` of the text, a piece at a time."""
        for at in range(start, stop, PIECE_BYTES):
            yield self.read(at, min(at + PIECE_BYTES, stop))


@dataclass(frozen=True)
class Piece:
    """What is tokenized at once: a part of `document`, from its byte `start` on. `last`: of what one split gets of it."""

    split: str
    document: Document
    start: int
    text: bytes
    last: bool

    def require_utf8(self) -> None:
        """Refuses bytes that are not UTF-8: raises ValueError, which names the file and the line."""
        try:
            self.text.decode()
        except UnicodeDecodeError as error:
            where, before = self.document.where, self.document.blocks(0, self.start + error.start)
            if self.document.is_file:
                where += f", line {1 + sum(block.count(10) for block in before)}"
            raise ValueError(
                f"{where}: not UTF-8 (the byte 0x{self.text[error.start]:02x}); write it again as UTF-8, or give "
                "data.tokenizer=bytes, which takes any"
            ) from None


def pieces(document: Document, holdout: float) -> Iterator[Piece]:
    """Yields a document in pieces, of one split, or of a long one its beginning and its end, cut between two lines."""
    size = document.size
    if size < LONG_BYTES or holdout == 0:
        parts = [("holdout" if holdout and is_held_out(document, holdout) else "train", 0, size)]
    else:
        cut = _line_before(document, round(size * (1 - holdout)))
        parts = [("train", 0, cut), ("holdout", cut, size)]
    for split, start, stop in parts:
        while True:
            text = document.read(start, min(start + PIECE_BYTES, stop))
            if start + len(text) < stop:
                text = text[: border(text)]
            last = start + len(text) == stop
            yield Piece(split, document, start, text, last)
            if last:
                break
            start += len(text)
    if isinstance(document.content, Stretch) and document.content.passing:
        document.content.path.unlink()


def border(text: bytes) -> int:
    """Returns where a text that goes on is cut (as the module says)."""
    at = len(text) - 1
    while (at := text.rfind(b"\n", 1, at)) > 0:
        if not text[at - 1 : at].isspace() and not text[at + 1 : at + 2].isspace():
            return at + 1
    return text.rfind(b"\n") + 1 or text.rfind(b" ") + 1 or whole_characters(text)


def whole_characters(text: bytes) -> int:
    """Counts how many bytes of a text are whole characters of UTF-8: all but up to three."""
    for back in range(1, min(4, len(text)) + 1):
        lead = text[-back]
        if lead & 0xC0 != 0x80:
            needed = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            return len(text) - back if needed > back else len(text)
    return len(text)


def is_held_out(document: Document, share: float) -> bool:
    """Says whether a hash of the bytes is below `share`."""
    digest = hashlib.blake2b(digest_size=8)
    for block in document.blocks(0, document.size):
        digest.update(block)
    return int.from_bytes(digest.digest()) < share * 2**64


def _line_before(document: Document, end: int) -> int:
    """Where the last line before `end` begins; `end`, or a character before it, where there is but one line."""
    for stop in range(end, 0, -PIECE_BYTES):
        start = max(0, stop - PIECE_BYTES)
        if (found := document.read(start, stop).rfind(b"\n")) >= 0:
            return start + found + 1
    start = max(0, end - 4)
    return start + whole_characters(document.read(start, end))
