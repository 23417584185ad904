"""What a run cannot be, as data: which options a refusal concerns, when it holds, and what is said then.

    Refusal(
        ("optim.in_backward", "clip_norm"),
        lambda run: run.optim.in_backward and run.clip_norm,
        "optim.in_backward with clip_norm={clip_norm}: the global norm is known only when ...; give clip_norm=0, or ...",
    )

It stands beside the feature that sets the limit, and reads the options of other rooms by name, without importing them: `run` is the
whole configuration. `trainer.check` gathers them from all rooms, and docs/composition.md is made by asking them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """What does not compose. `says` is a line: what was given, what is possible, what to change. `{optim.name}` stands in it for
    an option of the run; where it takes more than that, it is a function of the run."""

    options: tuple[str, ...]
    holds: Callable[[Any], Any]
    says: str | Callable[[Any], str]

    def told(self, run: Any) -> str:
        """Returns what is said of a run for which it holds."""
        return self.says.format_map(_Options(run)) if isinstance(self.says, str) else self.says(run)


Refusals = tuple[Refusal, ...]


class Refused(ValueError):
    """A run for which a refusal holds; `options` are those that it concerns."""

    options: tuple[str, ...] = ()


def refuse(run: Any, refusals: Iterable[Refusal]) -> None:
    """Raises Refused for the first refusal that holds."""
    for refusal in refusals:
        if refusal.holds(run):
            refused = Refused(refusal.told(run))
            refused.options = refusal.options
            raise refused


class _Options:
    """The options of a run by the names of their groups."""

    def __init__(self, run: Any):
        self._run = run

    def __getitem__(self, name: str) -> Any:
        return getattr(self._run, name)
