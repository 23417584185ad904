"""What the model wrote at the end."""

from collections.abc import Sequence

from rowwise.launch.pages.draw import name_of
from rowwise.launch.pages.markup import text
from rowwise.launch.pages.records import Run
from rowwise.trainer.starts import read_sample

FIELDS: frozenset[str] = frozenset()


def show(runs: Sequence[Run]) -> list[str]:
    """Shows what the model wrote, with the prompt in bold before it."""
    found = [(run, sample) for run in runs if (sample := read_sample(run.folder)) is not None]
    return [
        f"<h3>{f'{name_of(run)}, ' if len(runs) > 1 else ''}after step {sample.step:,}</h3>"
        f'<pre class="sample"><b>{text(sample.prompt)}</b>{text(sample.text.removeprefix(sample.prompt))}</pre>'
        for run, sample in found
    ]
