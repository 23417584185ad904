"""The words of a command that looks at a run without starting it: keys of its own, and those of the run."""

from collections.abc import Sequence
from typing import TypeVar

from rowwise.launch.compose import key_of
from rowwise.launch.settings import keys_of, parse

Keys = TypeVar("Keys")


def own_keys(kind: type[Keys], words: Sequence[str], example: str) -> tuple[Keys, list[str]]:
    """Splits words into the keys of a command, as the dataclass `kind`, and the overrides of its run. `example`: as in
    `settings.parse`. Raises ValueError."""
    names = keys_of(kind)
    own = [word for word in words if key_of(word) in names]
    return parse(kind, own, example), [word for word in words if key_of(word) not in names]


def check_world_size(world_size: int | None) -> None:
    """Refuses a number of workers that there cannot be; None is that of this machine. Raises ValueError."""
    if world_size is not None and world_size < 1:
        raise ValueError(f"world_size={world_size}: give the number of workers, 1 or more")
