"""An override KEY=VALUE: read as Hydra reads it, and written so that it reads it back."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from rowwise.launch.choices import GROUPS, choices_of
from rowwise.trainer.keys import refuse_control_characters, without_password

SEARCHPATH = "hydra.searchpath"  # how --config-dir stands in a list of overrides
KEY = re.compile(r"[A-Za-z_][\w.]*")
_PLAIN = re.compile(r"""(?!=)[^\[\]{}()'"$,\\]*""")  # no character that means something in a value


@functools.lru_cache(maxsize=10_000)
def parse(word: str) -> Override:
    """Reads an override as Hydra reads it; text that Hydra's grammar has no room for, such as ~/folder, is text: once each of
    those that the trials of a sweep share. Raises ValueError."""
    key, equals, value = word.partition("=")
    refuse_control_characters({key: value})
    bare, told = key.lstrip("+"), without_password(word)
    if key.startswith("~"):
        raise ValueError(f"{told}: no key can be taken away; leave it as it is, or give it another value")
    if not equals:
        raise ValueError(_no_pair(word))
    if not re.fullmatch(r"[A-Za-z_][\w./-]*", bare):
        raise ValueError(f"{told}: {bare or 'nothing'} is no key; give KEY=VALUE, such as optim.lr=1e-3")
    for text in (value, quoted(value)) if _PLAIN.fullmatch(value) else (value,):
        try:
            override = _parser().parse_override(f"{bare}={text}")
            override.value()
            return override
        except HydraException:
            continue
    raise ValueError(
        f"{told}: the value cannot be read; a list is [a,b], a table {{a: 1}}, and text that holds one of []{{}}()'\"$, stands "
        f"in quotes of its own: \"{bare}='...'\""
    )


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _no_pair(word: str) -> str:
    if word.endswith((".yaml", ".yml", ".json")):
        return f"{word}: an argument is KEY=VALUE; give config={word}"
    group = next((group for group in GROUPS if word in choices_of(group)), None)
    example = f"{group}={word}" if group else f"{word}=VALUE" if KEY.fullmatch(word) else "optim.lr=1e-3"
    return f"{word}: an argument is KEY=VALUE, such as {example}"


def spelt(override: Override) -> str:
    """Returns an override that was read, as a word."""
    assert override.type == OverrideType.CHANGE and override.input_line is not None
    return override.input_line


def quoted(value: str, interpolate: bool = False) -> str:
    """Quotes text as the value of an override that means these characters and nothing else, but for ${KEY} where `interpolate`."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return "'" + (escaped if interpolate else escaped.replace("${", "\\${")) + "'"


def as_typed(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line, --config-dir as it is written there."""
    found: list[str] = []
    for word in words:
        if not word.startswith(f"{SEARCHPATH}=["):
            found.append(word)
            continue
        folders: Any = parse(word).value()
        for folder in folders:
            found += ["--config-dir", str(folder).removeprefix("file://")]
    return found
