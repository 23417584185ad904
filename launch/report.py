"""Runs as one page: an HTML file that holds its pictures and needs nothing else, for a screen, a phone or paper.

    python -m rowwise.launch.report run=runs/NAME
    python -m rowwise.launch.report run=runs/NAME run=runs/OTHER to=compare.html
    python -m rowwise.launch.report run=runs/sweep-* to=sweep.html

    run=PATH             a run; several stand side by side. run=A,B and run=A run=B are the same; a pattern takes every
                         run that it matches and that has records
    to=FILE.html         the page; default: report.html in the folder of the first run

A run may be under way: the page shows what is there. Exit code 0: the page is written; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import argparse
import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rowwise.launch.pages.records import Run, read_run
from rowwise.trainer.files import write_whole
from rowwise.trainer.keys import unknown_key

KEYS = ["run", "to"]


@dataclass(frozen=True)
class Settings:
    """The keys, as they were given; an empty path was not."""

    folders: list[Path]
    to: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Writes the page. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rowwise.launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    try:
        print(report(parse(parser.parse_args(arguments).settings)))
    except (ValueError, OSError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str]) -> Settings:
    """`key=value` arguments, strictly. Raises ValueError."""
    folders: list[Path] = []
    to = ""
    for word in words:
        key, _, value = word.partition("=")
        if key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))
        if not value or (key == "to" and to):
            raise ValueError(f"{word}: give {key}=VALUE{', once' if key == 'to' else ''}")
        if key == "run":
            folders += folders_of(value)
        else:
            to = value
    if not folders:
        raise ValueError("run= is missing; give run=runs/NAME")
    twice = [path for path, n in Counter(folder.resolve() for folder in folders).items() if n > 1]
    if twice:
        raise ValueError(f"run={twice[0]} is given twice; give each run once")
    return Settings(folders, to)


def folders_of(value: str) -> list[Path]:
    """The folders that a value of `run` names: one, several with commas between, or all runs that match a pattern.
    Raises ValueError for a pattern that no run matches."""
    if Path(value).expanduser().exists():
        return [Path(value).expanduser()]
    if "," in value:
        return [folder for part in value.split(",") for folder in folders_of(part)]
    if not glob.has_magic(value):
        return [Path(value).expanduser()]
    found = [Path(path) for path in sorted(glob.glob(str(Path(value).expanduser())))]
    runs = [path for path in found if (path / "metrics.jsonl").is_file()]
    if not runs:
        raise ValueError(f"run={value}: no run with records matches; matched are {len(found)} other files and folders")
    return runs


def report(settings: Settings) -> str:
    """Writes the page and returns what it did, in a line. Raises ValueError before anything is written."""
    to = Path(settings.to).expanduser() if settings.to else settings.folders[0] / "report.html"
    if to.suffix.lower() not in (".html", ".htm") or to.is_dir():
        raise ValueError(f"to={to}: the page is a file; give a name that ends in .html")
    runs, left_out = read_runs(settings.folders)
    if not to.parent.is_dir():
        raise ValueError(f"to={to}: the folder {to.parent} does not exist; make it, or give another")
    from rowwise.launch.pages.page import page  # torch, which no refusal above waits for

    content = page(runs)
    write_whole(to, content)
    told = ", ".join(f"{run.label} at step {run.last_step}" for run in runs)
    return "; ".join(
        [f"{to}: {told}", f"{len(content.encode()) / 1e3:,.0f} kB", *(f"left out: {why}" for why in left_out)]
    )


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """In their order, each under the name of its folder, or under its path where others have that name; and why others of
    them are left out. Raises ValueError where none is left."""
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    runs: list[Run] = []
    left_out: list[str] = []
    for folder, label in zip(folders, labels, strict=True):
        try:
            runs.append(read_run(folder, len(runs), label))
        except ValueError as error:
            if not (folder / "metrics.jsonl").exists():
                raise
            left_out.append(str(error))
    if not runs:
        raise ValueError("; ".join(left_out))
    return runs, left_out


if __name__ == "__main__":
    sys.exit(main())
