"""Runs as one page: an HTML file that holds its pictures and needs nothing else, for a screen, a phone or paper.

    python -m rowwise.launch.report run=runs/NAME
    python -m rowwise.launch.report run=runs/NAME run=runs/OTHER to=compare.html
    python -m rowwise.launch.report run=runs/sweep-* to=sweep.html
    python -m rowwise.launch.report run=runs/NAME watch=true

    run=PATH             a run; several stand side by side. run=A,B and run=A run=B are the same; a pattern takes every
                         run that it matches and that has records
    to=FILE.html         the page; default: report.html in the folder of the first run
    watch=true           write it again while a run goes on, until all have ended; an open page reloads itself

A run may be under way: the page shows what is there. Every run leaves its report.html when it ends, also when it failed
(`report=always`, `failed` or `never`). Exit code 0: the page is written; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import contextlib
import glob
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rowwise.launch.outcome import OUTCOME
from rowwise.launch.pages.records import Run, read_run
from rowwise.launch.settings import bare_words
from rowwise.trainer.files import write_whole
from rowwise.trainer.keys import unknown_key
from rowwise.trainer.lock import is_held

KEYS = ["run", "to", "watch"]
RELOAD_SECONDS = 10  # of a page that is watched, at least
SHARE = 20  # a page that takes a second to write is written every 20 seconds at most: a run has the cores for itself
POLL_SECONDS = 1.0
GRACE_SECONDS = 30.0  # for a run that is between two starts, or whose end is not written down yet


@dataclass(frozen=True)
class Settings:
    """The keys, as they were given; an empty path was not."""

    folders: list[Path]
    to: str = ""
    watch: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Writes the page. Returns the exit code."""
    words = bare_words("rowwise.launch.report", __doc__, arguments)
    try:
        settings = parse(words)
        print(watch(settings) if settings.watch else report(settings))
    except (ValueError, OSError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def parse(words: Sequence[str]) -> Settings:
    """Reads `key=value` arguments, strictly. Raises ValueError."""
    folders: list[Path] = []
    once: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in KEYS:
            raise ValueError(unknown_key(key, KEYS))
        if not value or key in once:
            raise ValueError(f"{word}: give {key}=VALUE{'' if key == 'run' else ', once'}")
        if key == "run":
            folders += folders_of(value)
        else:
            once[key] = value
    watched = once.get("watch", "false").lower()
    if watched not in ("true", "false"):
        raise ValueError(f"watch={once['watch']}: give watch=true or watch=false")
    if not folders:
        raise ValueError("run= is missing; give run=runs/NAME")
    twice = [path for path, n in Counter(folder.resolve() for folder in folders).items() if n > 1]
    if twice:
        raise ValueError(f"run={twice[0]} is given twice; give each run once")
    return Settings(folders, once.get("to", ""), watched == "true")


def folders_of(value: str) -> list[Path]:
    """Returns the folders that a value of `run` names: one, several with commas between, or all runs that match a pattern.
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


def watch(settings: Settings) -> str:
    """Writes the page again and again until every run has ended or Ctrl-C comes, and then once more, as it stays. Returns
    what it did, in a line. Raises ValueError."""
    place_of(settings)
    every, due, written = RELOAD_SECONDS, 0.0, ""
    alive_at = time.monotonic() - GRACE_SECONDS
    with contextlib.suppress(KeyboardInterrupt):
        while going := [folder for folder in settings.folders if not (folder / OUTCOME).is_file()]:
            if any(map(is_held, going)):
                alive_at = time.monotonic()
            if time.monotonic() - alive_at >= GRACE_SECONDS:
                break
            if time.monotonic() >= due and (now := _sizes(settings.folders)) != written:
                began = time.process_time()
                with contextlib.suppress(ValueError):  # no records yet
                    told = report(settings, every)
                    if not written:
                        print(f"{told}; written again while the run goes on, Ctrl-C ends that", flush=True)
                    written = now
                every = max(RELOAD_SECONDS, round(SHARE * (time.process_time() - began)))
                due = time.monotonic() + every
            time.sleep(POLL_SECONDS)
    return report(settings)


def _sizes(folders: Sequence[Path]) -> str:
    """Of the records, which grow as long as there is something new to show."""
    return str(
        [(folder / "metrics.jsonl").stat().st_size for folder in folders if (folder / "metrics.jsonl").is_file()]
    )


def place_of(settings: Settings) -> Path:
    """Returns where the page goes. Raises ValueError."""
    to = Path(settings.to).expanduser() if settings.to else settings.folders[0] / "report.html"
    if to.suffix.lower() not in (".html", ".htm") or to.is_dir():
        raise ValueError(f"to={to}: the page is a file; give a name that ends in .html")
    return to


def report(settings: Settings, reload_seconds: int | None = None) -> str:
    """Writes the page, which with `reload_seconds` reloads itself, and returns what it did, in a line. Raises ValueError
    before anything is written."""
    to = place_of(settings)
    runs, left_out = read_runs(settings.folders)
    if not to.parent.is_dir():
        raise ValueError(f"to={to}: the folder {to.parent} does not exist; make it, or give another")
    from rowwise.launch.pages.page import page  # torch, which no refusal above waits for

    content = page(runs, reload_seconds)
    write_whole(to, content)
    told = ", ".join(f"{run.label} at step {run.last_step}" for run in runs)
    return "; ".join(
        [f"{to}: {told}", f"{len(content.encode()) / 1e3:,.0f} kB", *(f"left out: {why}" for why in left_out)]
    )


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Reads runs in their order, each under the name of its folder, or under its path where others have that name; and why others of
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
