"""Every run and sweep below a folder: how it stands, and the command that goes on with it.

    rowwise runs                        those below runs and sweeps, here
    rowwise runs DIR DIR ...            those below these folders
    rowwise runs watch=true             again and again, those under way first, until Ctrl-C
    rowwise runs json=true              as JSON, a list of one object each, for programs

A run is running (it holds its lock), silent (it holds it, and has made no step for long), complete, stopped (asked to, and saved),
killed (it left no word), failed or refused (and why), or not begun; a trial that its search ended is pruned. tokens/s are of one
worker; they and the time left are means over the last steps. What is damaged in one run is said there and ends nothing.
Exit code 0; 2 where a folder is not there.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rowwise.launch.settings import bare_words
from rowwise.launch.standing import Standing, standings
from rowwise.trainer.files import to_json
from rowwise.trainer.keys import unknown_key
from rowwise.trainer.screen import byte_count, clock, columns, cut, is_terminal, padded, width_of, wrapped

KEYS = ["watch", "json"]
USUAL = ("runs", "sweeps")
WATCH_SECONDS = 2.0
HOME = "\x1b[H\x1b[J"  # to the first column of the first line; nothing after it
HEAD = ("run", "state", "step", "loss", "held-out", "tokens/s", "left", "size")
LEAST_NAME = 8  # columns
UNDER_WAY = ("running", "silent")


@dataclass(frozen=True)
class Settings:
    """The folders, and how they are shown."""

    folders: tuple[Path, ...]
    watch: bool = False
    json: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Prints the list. Returns the exit code."""
    words = bare_words("rowwise runs", __doc__, arguments, "DIR | KEY=VALUE")
    try:
        settings = parse(words)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    if settings.watch:
        watch(settings.folders)
    elif settings.json:
        print(to_json([_plain(one) for one in standings(settings.folders)], indent=1))
    else:
        print(
            listed(standings(settings.folders), _width()) or f"no runs below {' and '.join(map(str, settings.folders))}"
        )
    return 0


def parse(words: Sequence[str]) -> Settings:
    """Reads folders and `key=value` arguments. Raises ValueError."""
    folders: list[Path] = []
    chosen: dict[str, bool] = {}
    for word in words:
        key, given, value = word.partition("=")
        path = Path(word).expanduser() if not word.startswith("~") or word.startswith("~/") else Path(word)
        if path.is_dir():
            folders.append(path)
        elif not given:
            raise ValueError(f"{word}: there is no such folder; give one that has runs below it, such as runs")
        elif key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))
        elif value not in ("true", "false"):
            raise ValueError(f"{word}: give {key}=true or {key}=false")
        else:
            chosen[key] = value == "true"
    if chosen.get("watch") and chosen.get("json"):
        raise ValueError("watch=true with json=true: one is for people, the other for programs; give one of them")
    folders = folders or [path for name in USUAL if (path := Path(name)).is_dir()]
    if not folders:
        raise ValueError(f"there is no folder {' or '.join(USUAL)} here; give one that has runs below it")
    return Settings(tuple(folders), **chosen)


def watch(folders: Sequence[Path]) -> None:
    """Shows the list again and again, those under way first, as many as the screen holds, until Ctrl-C."""
    screen = is_terminal(sys.stdout)
    try:
        while True:
            found = sorted(standings(folders), key=lambda one: one.state not in UNDER_WAY)
            lines = (listed(found, _width()) or "no runs yet").split("\n")
            if screen:
                rows = shutil.get_terminal_size().lines - 1
                lines = lines if len(lines) <= rows else [*lines[: rows - 1], "..."]
                lines = [cut(line, _width() or len(line)) for line in lines]
            print(f"{HOME if screen else ''}{chr(10).join(lines)}", flush=True)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return


def listed(found: Iterable[Standing], width: int | None) -> str:
    """Returns the table: a line a run, its reason and the command that goes on with it behind, or below where a line of `width`
    columns does not hold them (None: it holds everything). A name that is longer than its column stands on a line of its own.
    Nothing is cut."""
    rows = [(one, _cells(one)) for one in found]
    if not rows:
        return ""
    sizes = [max(columns(HEAD[i]), *(columns(cells[i]) for _, cells in rows)) for i in range(len(HEAD))]
    if width is not None:
        sizes[0] = min(sizes[0], max(LEAST_NAME, width - sum(sizes[1:]) - 2 * (len(sizes) - 1)))
    lines = [_line(HEAD, sizes)]
    for one, cells in rows:
        if columns(cells[0]) > sizes[0]:
            lines.append(cells[0])
            cells = ("", *cells[1:])
        lines += _with_details(_line(cells, sizes), sum(sizes) + 2 * (len(sizes) - 1), one, width)
    return "\n".join(lines)


def _with_details(line: str, filled: int, one: Standing, width: int | None) -> list[str]:
    """The line, and the reason and the command behind it or below. A command is not wrapped: a terminal that breaks it by itself
    still copies it whole."""
    reason, command = _printable(one.reason or ""), _printable(one.goes_on or "")
    whole = "  ".join(filter(None, [padded(line, filled), reason, command])) if reason or command else line
    if width is None or columns(whole) <= width:
        return [whole]
    below = wrapped(f"    {reason}", width, hanging=6) if reason else []
    return [line, *below, *([f"    {command}"] if command else [])]


def _line(cells: Sequence[str], sizes: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    laid = [padded(cell, size, right=i > 1) for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))]
    return "  ".join(laid).rstrip()


def _cells(one: Standing) -> tuple[str, ...]:
    name = f"  {one.folder.name}" if one.sweep is not None else str(one.folder)
    progress = "" if one.step is None else f"{one.step}/{one.steps}" if one.steps is not None else str(one.step)
    return (
        _printable(name),
        one.state,
        progress,
        _form(one.loss, "{:.4f}"),
        _form(one.eval_loss, "{:.4f}"),
        _form(one.tokens_per_second, "{:,.0f}"),
        "" if one.seconds_left is None else clock(one.seconds_left),
        byte_count(one.bytes),
    )


def _form(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _printable(text: str) -> str:
    """What a stranger's folder is called, or says, moves no cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _plain(one: Standing) -> dict[str, object]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(one).items()}


def _width() -> int | None:
    """The columns of the terminal; None where there is none, and lines are as long as they are."""
    return width_of(sys.stdout) if is_terminal(sys.stdout) else None


if __name__ == "__main__":
    sys.exit(main())
