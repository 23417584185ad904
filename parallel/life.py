"""The life of a storage in a step: from what was seen of it, what it was for.

That is known only when the step is over, so it is decided then, for the whole life:

| category | a storage that |
|---|---|
| gathered | is a whole parameter beside the rank's rows |
| gradients | was a gradient of a parameter, whole or split, or on its way to one |
| messages | crossed ranks, and was not kept for a backward; or is a copy that neighbours gather from |
| loss | was made between the last norm's output and its gradient, and is none of those before |
| host | is where offloaded activations wait in the host's memory; not counted in the total |
| activations | was made by a forward and there when a backward began, or by a backward and there when that ended |
| working | is none of them: it came and went inside a forward, a backward or the optimizer's step |
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

MOVING = ("gathered", "gradients", "activations", "loss", "messages", "working", "host")


@dataclass(slots=True)
class Life:
    """Of one storage: its bytes, what made it, the operation that it was born in and the last at which it was there, counted in
    the step, and what was seen of it. `returning`: born in a backward; `late`: born after the last norm."""

    size: int
    operation: str
    born: int
    returning: bool
    late: bool
    died: int | None = None
    stays: bool = False
    whole: bool = False
    gradient: bool = False
    sent: bool = False
    moved: bool = False
    kept: bool = False
    host: bool = False

    @property
    def category(self) -> str | None:
        """Names what it is counted as; None: not of this step, or counted elsewhere."""
        if self.stays or self.whole:
            return None
        if self.host:
            return "host"
        if self.gradient:
            return "gradients"
        if self.sent or self.moved:
            return "activations" if self.kept and not self.sent else "messages"
        if self.late:
            return "loss"
        return "activations" if self.kept else "working"


def on_device(changes: dict[str, Counter[int]]) -> Counter[int]:
    """Adds up the changes of the categories that a device holds."""
    every = Counter[int]()
    for category, by in changes.items():
        if category != "host":
            every.update(by)
    return every


def held(changes: Counter[int]) -> Iterator[tuple[int, int]]:
    """Gives (when, bytes) after each change."""
    when = sorted(changes)
    return zip(when, itertools.accumulate(changes[at] for at in when), strict=True)
