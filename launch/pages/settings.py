"""The whole configuration of each run, folded away."""

from collections.abc import Sequence

from rowwise.launch.pages.markup import scroll, text
from rowwise.launch.pages.records import Run

FIELDS: frozenset[str] = frozenset()


def show(runs: Sequence[Run]) -> list[str]:
    return [
        f"<details><summary>{text(run.label)}: config.yaml</summary>"
        f"{scroll(f'Configuration of {run.label}', f'<pre>{text(run.config_text)}</pre>')}</details>"
        for run in runs
        if run.config_text
    ]
