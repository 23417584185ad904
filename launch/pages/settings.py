"""The whole configuration of each run, folded away."""

from collections.abc import Sequence

from rowwise.launch.pages.markup import scroll, text
from rowwise.launch.pages.records import Run

FIELDS: frozenset[str] = frozenset()


def show(runs: Sequence[Run]) -> list[str]:
    return [
        f"<details><summary>{text(run.label)}: config.yaml</summary>"
        f"{_command(run)}{scroll(f'Configuration of {run.label}', f'<pre>{text(run.config_text)}</pre>')}</details>"
        for run in runs
        if run.config_text
    ]


def _command(run: Run) -> str:
    """By which it was started last."""
    command = run.starts[-1].command if run.starts else None
    return f"<p><code>{text(command)}</code></p>" if command else ""
