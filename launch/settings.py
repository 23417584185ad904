"""`key=value` arguments of the commands that are no run, as a dataclass. Needs no torch: what is mistyped is refused at once."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rowwise.trainer.keys import unknown_key

Keys = TypeVar("Keys")


def parse(kind: type[Keys], settings: Sequence[str], example: str, also: Sequence[str] = ()) -> Keys:
    """The keys that were given, as the dataclass `kind`, strictly: each once, each known and of its type. `example` is what
    is advised where one is missing; `also`: keys that are read elsewhere. Raises ValueError."""
    own: Any = fields(kind)  # type: ignore[arg-type]
    known, given = [field.name for field in own], dict[str, str]()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(unknown_key(key, [*known, *also]))
        if not value or key in given:
            raise ValueError(f"{setting}: give {key}=VALUE, once")
        given[key] = value
    for field in own:
        if field.default is MISSING and field.name not in given:
            raise ValueError(f"{field.name}= is missing; give {example}")
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, said = first["loc"][0], first["msg"].partition(",")[0]
        raise ValueError(f"{key}={first['input']}: {said[0].lower()}{said[1:]}") from None
