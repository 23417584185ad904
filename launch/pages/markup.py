"""HTML in pieces. What comes from a run is text: it is escaped here, once."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rowwise.trainer.console import clock

BROAD = 8  # columns, of which more need a large screen


class Marked(str):
    """HTML already."""


def text(value: Any) -> str:
    """Escapes text, so that HTML shows it as it is."""
    return value if isinstance(value, Marked) else escape(str(value))


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def figure(title: str, caption: str, picture: str, wide: bool = False) -> str:
    """Returns a picture (SVG) under its title and the numbers that matter (HTML). A wide one scrolls in its own box."""
    if wide:
        picture = scroll(title, picture)
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><figcaption><strong>{text(title)}</strong> {caption}</figcaption>{picture}</figure>"


def scroll(name: str, content: str) -> str:
    """Returns a box that scrolls sideways by itself, by keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{text(name)}" tabindex="0">{content}</div>'


def grid(figures: Iterable[str]) -> list[str]:
    """Puts figures side by side as far as the page is wide; nothing where there are none."""
    there = [piece for piece in figures if piece]
    return [f'<div class="grid">{"".join(there)}</div>'] if there else []


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table under its title, in a box of its own. The first cell of a row names it; what is HTML stands in a `Marked`.
    On a narrow screen a row is a block, and each of its cells stands behind the name of its column."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    columns = [_spoken(cell) for cell in head[1:]]
    body = "".join(f"<tr>{_cells(row, columns)}</tr>" for row in rows)
    broad = ' class="broad"' if len(head) > BROAD else ""
    whole = f"<table{broad}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h3>{text(name)}</h3>{scroll(name, whole)}"


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Says what is known of one thing, a line each."""
    return f"<dl>{''.join(f'<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>' for key, value in pairs)}</dl>"


def _cells(row: Sequence[Any], columns: Sequence[str]) -> str:
    name, *others = map(text, row)
    cells = (f'<td data-of="{column}"><span>{cell}</span></td>' for column, cell in zip(columns, others, strict=True))
    return f'<th scope="row">{name}</th>{"".join(cells)}'


def _spoken(value: Any) -> str:
    """Its words, for an attribute."""
    return re.sub("<[^>]*>", "", text(value))


def short(number: float, digits: int = 3) -> str:
    """Writes a number such as 12, 3.14, 1.5k, 2M or 1e-5."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < 1e15:
            return f"{fixed(number / size, digits)}{letter}"
    return (
        _without_zeros(f"{number:.{digits}g}") if abs(number) >= 1e15 or abs(number) < 1e-4 else fixed(number, digits)
    )


def fixed(number: float, digits: int = 3) -> str:
    """Writes a number with as many significant digits, without an exponent or zeros at the end: 697, 1.5, 0.0312."""
    if not number or not math.isfinite(number):
        return f"{number:g}"
    behind = _behind(number, digits)
    told = f"{number:.{behind}f}"
    return told.rstrip("0").rstrip(".") if behind else told


def _behind(number: float, digits: int) -> int:
    """Digits behind the point."""
    return max(0, digits - 1 - math.floor(math.log10(abs(number))))


def rate(number: float, digits: int = 3) -> str:
    """Writes a learning rate as people do: 3e-4, 1.5e-3, 0.01."""
    if not number or abs(number) >= 0.01:
        return short(number, digits)
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def loss(number: float) -> str:
    """Writes a loss with four digits, of which two runs often share three: 2.780."""
    return f"{number:.{_behind(number, 4)}f}" if 1e-4 < abs(number) < 1e3 else short(number, 4)


def _without_zeros(told: str) -> str:
    return re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", told)


def whole(number: float) -> str:
    """Writes a whole number such as 65,536."""
    return f"{number:,.0f}" if number == round(number) else short(number)


def size(number: float) -> str:
    """Writes bytes, such as 1.5 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= unit:
            return f"{fixed(number / unit)} {name}"
    return f"{number:,.0f} B"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def duration(seconds: float) -> str:
    """Writes seconds such as 3:07, 1:02:07 or, where it is short, 7.1 s and 2.85 ms."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if unit <= seconds < 60:
            return f"{fixed(seconds / unit)} {name}"
    return f"{seconds:.3g} s" if seconds < 60 else clock(round(seconds))
