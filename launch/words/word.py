"""What one name of others is answered with."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Word:
    """A word of others: its `names` elsewhere, what is written here instead of NAME=VALUE, and what that is.

    `write`: where the value does not decide it; none: there is no such thing here. `values`: by the value, in small letters.
    `group`: the value is the name of a choice, which the table CHOICES may know.
    """

    names: str
    write: str = ""
    means: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    group: str = ""


def switch(on: str, off: str = "") -> dict[str, str]:
    return {"true": on, "1": on, "false": off, "0": off}
