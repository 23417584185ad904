"""A line of JSON that is too long to be held: its text goes to a file, a block at a time.

Grammar and refusals are those of `json.loads`; what stands in a string is given to it in pieces.
"""

import json
import re
from collections.abc import Callable
from typing import Protocol

from rowwise.trainer.data.pieces import whole_characters

BLOCK_BYTES = 1 << 20
_DEEPEST = 200
_ESCAPE_BYTES = 12  # more than an escape, or a character, that is cut off
_STRING = re.compile(rb'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)  # of escapes only whole ones
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]*+")


class Lines(Protocol):
    """A file, opened for its bytes."""

    def readline(self, size: int, /) -> bytes: ...


class LongLine:
    """The line that `begun` begins and `file` goes on with."""

    def __init__(self, begun: bytes, file: Lines):
        self._buffer, self._at, self._file, self._ended = begun, 0, file, False

    def text(self, column: str, sink: Callable[[bytes], object]) -> bool:
        """Gives the text of `column` to `sink`, as UTF-8, and says whether it was there. Raises ValueError for what is no JSON
        object, or has the column twice."""
        found: list[bool] = []

        def member(key: str) -> None:
            if key != column:
                return self._value(1)
            if found:
                raise ValueError(f"it has {column!r} twice")
            found.append(self._peek() == b'"')
            return self._string(sink) if found[0] else self._value(1)

        self._members(member)
        if self._peek():
            raise ValueError("more stands after the object")
        return found == [True]

    def _more(self) -> bool:
        """Reads another block of the line; False at its end."""
        if self._ended:
            return False
        block = self._file.readline(BLOCK_BYTES)
        self._ended = len(block) < BLOCK_BYTES or block.endswith(b"\n")
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return bool(block)

    def _run(self, pattern: re.Pattern[bytes]) -> bytes:
        """What matches `pattern` from here on, which may go on in the next block."""
        match = pattern.match(self._buffer, self._at)
        assert match is not None
        self._at = match.end()
        return match.group()

    def _peek(self) -> bytes:
        """The next character that is no white space; none at the end."""
        while True:
            self._run(_SPACE)
            if self._at < len(self._buffer):
                return self._buffer[self._at : self._at + 1]
            if not self._more():
                return b""

    def _take(self, *possible: bytes) -> bytes:
        character = self._peek()
        if character not in possible:
            raise ValueError(f"not JSON (expected {b' or '.join(possible).decode()})")
        self._at += 1
        return character

    def _members(self, member: Callable[[str], None]) -> None:
        self._take(b"{")
        if self._peek() == b"}":
            self._at += 1
            return
        while True:
            key: list[bytes] = []
            self._string(key.append)
            self._take(b":")
            member(b"".join(key).decode())
            if self._take(b",", b"}") == b"}":
                return

    def _value(self, depth: int) -> None:
        """Passes over one."""
        if depth > _DEEPEST:
            raise ValueError("it is nested too deep")
        character = self._peek()
        if character == b'"':
            self._string(len)
        elif character == b"{":
            self._members(lambda key: self._value(depth + 1))
        elif character == b"[":
            self._at += 1
            if self._peek() == b"]":
                self._at += 1
                return
            self._value(depth + 1)
            while self._take(b",", b"]") == b",":
                self._value(depth + 1)
        else:
            scalar = self._run(_SCALAR)
            while self._at == len(self._buffer) and self._more():
                scalar += self._run(_SCALAR)
            json.loads(scalar)

    def _string(self, sink: Callable[[bytes], object]) -> None:
        self._take(b'"')
        half = ""  # of a pair of surrogates
        while True:
            piece = self._run(_STRING)
            ended = self._buffer[self._at : self._at + 1] == b'"'
            kept = len(piece) if ended else whole_characters(piece)
            self._at += ended - (len(piece) - kept)
            text = half + json.loads(f'"{piece[:kept].decode()}"')
            half = text[-1:] if not ended and "\ud800" <= text[-1:] <= "\udbff" else ""
            sink(encoded(text.removesuffix(half)))
            if ended:
                return
            if len(self._buffer) - self._at > _ESCAPE_BYTES:
                raise ValueError("not JSON (there is no such escape)")
            if not self._more():
                raise ValueError("not JSON (a string does not end)")


def encoded(text: str) -> bytes:
    """Returns the text as UTF-8. JSON spells what is beyond 16 bits as two halves. Raises ValueError where one of them is
    missing."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16").encode()
    except UnicodeDecodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character") from None
