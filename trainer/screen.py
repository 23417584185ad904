"""Text for people: how wide it is on a terminal, how it flows and wraps, numbers as people read them, and lines at the foot of a
terminal that are painted again and again. Needs no torch."""

import contextlib
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FALLBACK_COLUMNS = 80
CLEAR = "\r\x1b[J"  # back to the first column; nothing from there to the end of the screen


def columns(text: str) -> int:
    """Counts how many columns of a terminal `text` takes: two for a wide character, none for a mark on the one before."""
    if text.isascii():
        return len(text)
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def padded(text: str, width: int, right: bool = False) -> str:
    """Pads `text` with spaces up to `width` columns, behind it or (`right`) before it."""
    space = " " * (width - columns(text))
    return space + text if right else text + space


def cut(text: str, width: int) -> str:
    """Returns the first `width` columns of `text`."""
    kept, used = [], 0
    for character in text:
        used += _width(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept)


def wrapped(text: str, width: int, hanging: int = 0) -> list[str]:
    """Wraps `text` in lines of at most `width` columns, broken at spaces, those after the first indented by `hanging`. A word that
    is longer stands on a line of its own, whole, so that it can be copied: the terminal breaks it."""
    lines, line = [], ""
    for piece in re.findall(r"\s*\S+", text):
        if line.strip() and columns(line + piece) > width:
            lines.append(line)
            line = " " * hanging + piece.lstrip()
        else:
            line += piece
    return [*lines, line]


def flowed(fields: Sequence[str], width: int, hanging: int = 0) -> list[str]:
    """Puts `fields` side by side, two spaces between them, in as few lines of at most `width` columns as hold them in their order;
    those after the first indented by `hanging`, where there is room."""
    lines: list[str] = []
    for field in fields:
        if lines and columns(lines[-1]) + 2 + columns(field) <= width:
            lines[-1] += f"  {field}"
        else:
            space = " " * hanging if lines and hanging + columns(field) <= width else ""
            lines.append(space + cut(field, width))
    return lines


def boxed(title: str, lines: Sequence[str], width: int, rule: str = "─") -> str:
    """Puts `lines` between two rules, the upper with a title, which stands below it where it is too long. Without sides, so that
    what is copied out of it is whole."""
    upper = f"{rule * 2} {title} "
    above = (
        [upper + rule * (width - columns(upper))] if columns(upper) <= width else [rule * width, *wrapped(title, width)]
    )
    return "\n".join([*above, *lines, rule * width])


def clock(seconds: float) -> str:
    """Writes seconds such as 3:07, 1:02:07 or 3 d 01:02."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def byte_count(number: float) -> str:
    """Writes bytes such as 850 bytes, 12.3 MB or 1.24 TB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 999.5 else f"{number:,.0f} TB"


def count(number: float) -> str:
    """Writes a number such as 4,096, 7.61 M or 1.24 B."""
    if number < 1_000_000:
        return f"{number:,.0f}"
    number /= 1_000_000
    for unit in ("M", "B"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} T"


def width_of(stream: Any) -> int:
    """Returns the columns of the terminal that `stream` is; 80 where it is none or does not tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(stream.fileno()).columns or FALLBACK_COLUMNS
    return FALLBACK_COLUMNS


def is_terminal(stream: Any) -> bool:
    """Says whether lines of `stream` can be painted over."""
    with contextlib.suppress(ValueError, AttributeError):  # closed, or none
        return bool(stream.isatty())
    return False


def holds(stream: Any, text: str) -> bool:
    """Says whether `stream` can write every character of `text`."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


def same_file(one: Any, other: Any) -> bool:
    """Says whether two streams lead to one file or terminal, where the order of their lines is seen."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.path.sameopenfile(one.fileno(), other.fileno())
    return False


def take_foot(stream: Any) -> bool:
    """Takes the foot of the terminal that `stream` is for this process, until it ends: of several runs that print to one
    terminal, the first. A lock of POSIX, for that is of a process, where other locks are of the open file that a shell gives to
    all it starts."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two, systems decide
        return False
    except (OSError, ValueError, AttributeError):  # it knows no locks
        return True
    return True


class Foot:
    """Lines at the foot of a terminal. Each change is one write, for other processes write there too; between two the cursor
    stands behind the first line, so that what they say is appended to it and not lost below."""

    def __init__(self, stream: Any):
        self._stream, self._lines = stream, list[str]()

    def paint(self, lines: list[str]) -> None:
        """Paints these lines in place of those before; none, and the foot is free."""
        self._lines = lines
        self._write("")

    def say(self, text: str) -> None:
        """Writes text above the lines."""
        self._write(f"{text}\n")

    def _write(self, above: str) -> None:
        painted = "\n".join(f"{line}\x1b[K" for line in self._lines) + "\x1b[J"
        back = f"\x1b[{len(self._lines) - 1}A" if len(self._lines) > 1 else ""
        if self._lines:
            back += f"\r\x1b[{columns(self._lines[0])}C"
        self._stream.write(f"{CLEAR if above or not self._lines else chr(13)}{above}{painted}{back}")
        self._stream.flush()
