"""HTML in pieces. What comes from a run is text: it is escaped here, once."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from rowwise.trainer.console import clock


class Marked(str):
    """HTML already."""


def text(value: Any) -> str:
    """As HTML shows it."""
    return value if isinstance(value, Marked) else escape(str(value))


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def figure(title: str, caption: str, picture: str, wide: bool = False) -> str:
    """A picture (SVG) under its title and the numbers that matter (HTML). A wide one scrolls in its own box."""
    if wide:
        picture = scroll(title, picture)
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><figcaption><strong>{text(title)}</strong> {caption}</figcaption>{picture}</figure>"


def scroll(name: str, content: str) -> str:
    """A box that scrolls sideways by itself, by keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{text(name)}" tabindex="0">{content}</div>'


def grid(figures: Iterable[str]) -> list[str]:
    """Figures side by side as far as the page is wide; nothing where there are none."""
    there = [piece for piece in figures if piece]
    return [f'<div class="grid">{"".join(there)}</div>'] if there else []


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table under its title, in a box of its own. The first cell of a row names it; what is HTML stands in a `Marked`."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    whole = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h3>{text(name)}</h3>{scroll(name, whole)}"


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """What is known of one thing, a line each."""
    return f"<dl>{''.join(f'<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>' for key, value in pairs)}</dl>"


def _cells(row: Sequence[Any]) -> str:
    name, *others = map(text, row)
    return f'<th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in others)


def short(number: float, digits: int = 4) -> str:
    """Such as 12, 3.142, 1.5k, 2M or 1e-05."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < 1e15:
            return f"{number / size:.{digits}g}{letter}"
    return f"{number:.{digits}g}"


def whole(number: float) -> str:
    """Such as 65,536."""
    return f"{number:,.0f}" if number == round(number) else f"{number:,.4g}"


def size(number: float) -> str:
    """Bytes, such as 1.50 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:,.0f} B"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def duration(seconds: float) -> str:
    """Such as 3:07, 1:02:07 or, where it is short, 7.1 s."""
    return f"{seconds:.3g} s" if seconds < 60 else clock(round(seconds))
