"""What the runs said last: the ends of train.log and of the logs of ranks, folded away where all went well."""

from collections.abc import Sequence
from pathlib import Path

from rowwise.launch.pages.markup import scroll, text
from rowwise.launch.pages.records import Run
from rowwise.launch.standing import of_run
from rowwise.trainer.runlog import logs_with_words

FIELDS: frozenset[str] = frozenset()
LINES, LINE_BYTES = 40, 400  # of a log
LOGS = 8  # of a run: its own, and those of the first ranks


def show(runs: Sequence[Run]) -> list[str]:
    return [piece for run in runs for piece in of_one(run)]


def of_one(run: Run) -> list[str]:
    opened = " open" if of_run(run.folder).state in ("failed", "killed", "silent") else ""
    names = {path: f"{run.label}: {path.relative_to(run.folder)}" for path in logs_with_words(run.folder)[:LOGS]}
    return [
        f"<details{opened}><summary>{text(name)}</summary>{scroll(name, f'<pre>{text(end_of(path))}</pre>')}</details>"
        for path, name in names.items()
    ]


def end_of(path: Path) -> str:
    """Returns the last lines of a log, from the start of one."""
    with path.open("rb") as file:
        length = file.seek(0, 2)
        kept = min(length, LINES * LINE_BYTES)
        file.seek(length - kept)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join((lines[1:] if kept < length else lines)[-LINES:])
