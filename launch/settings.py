"""`key=value` arguments of the commands that are no run, as a dataclass. Needs no torch: what is mistyped is refused at once."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rowwise.trainer.keys import told_of_type, unknown_key

Keys = TypeVar("Keys")


def read_words(prog: str, description: str | None, arguments: Sequence[str]) -> list[str]:
    """Reads the arguments of a command as KEY=VALUE: --max-tokens=9 and --max-tokens 9 are max_tokens=9. --help prints
    `description` and leaves."""
    words, left = list[str](), iter(arguments)
    for word in left:
        if not word.startswith("--") or word == "--help":
            words.append(word)
            continue
        key, given, value = word.removeprefix("--").partition("=")
        words.append(f"{key.replace('-', '_')}={value if given else next(left, '')}")
    return bare_words(prog, description, words)


def bare_words(
    prog: str, description: str | None, arguments: Sequence[str] | None, what: str = "KEY=VALUE"
) -> list[str]:
    """Reads the arguments of a command (None: of this process) as they are. --help prints `description` and leaves."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="*", metavar=what)
    return parser.parse_args(arguments).words


def parse(kind: type[Keys], settings: Sequence[str], example: str, also: Sequence[str] = ()) -> Keys:
    """Reads the keys that were given, as the dataclass `kind`, strictly: each once, each known and of its type. `example` is what
    is advised where one is missing; `also`: keys that are read elsewhere. Raises ValueError."""
    known, given = keys_of(kind), dict[str, str]()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(unknown_key(key, [*known, *also]) + _advice(setting))
        if not value or key in given:
            raise ValueError(f"{setting}: give {key}=VALUE, once")
        given[key] = value
    for key, field in known.items():
        if field.default is MISSING and key not in given:
            raise ValueError(f"{key}= is missing; give {example}")
    try:
        return TypeAdapter(kind).validate_python({known[key].name: value for key, value in given.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{str(first['loc'][0]).rstrip('_')}={first['input']}: {told_of_type(first)}") from None


def keys_of(kind: type[Any]) -> dict[str, Any]:
    """Returns key -> field of a dataclass of keys. A field that would be a word of Python ends in _, which its key does not."""
    return {field.name.rstrip("_"): field for field in fields(kind)}


def free_folder(final: Path) -> Path:
    """The folder to make: what a link leads to, not the link. Raises ValueError."""
    if final.is_symlink() and not final.exists():
        raise ValueError(
            f"to={final} is a link to {final.readlink()}, which is not there; make that folder, or give another"
        )
    final = final.resolve() if final.is_symlink() else final
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"to={final} exists and is not empty; give a new folder, or remove it")
    return final


def _advice(setting: str) -> str:
    """What is said of an argument without a key."""
    if "=" in setting:
        return ""
    return f"; give run={setting}" if Path(setting).expanduser().is_dir() else "; an argument is KEY=VALUE"
