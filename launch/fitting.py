"""What the value of an override can only mean, beside the one that stands there."""

from typing import Any

from hydra.core.override_parser.types import Override

from rowwise.launch.answers import unknown_choice
from rowwise.launch.choices import GROUPS, choices_of
from rowwise.trainer.run_length import INTERVALS

YES = {"yes": True, "on": True, "1": True, "true": True, "no": False, "off": False, "0": False, "false": False}


def fitting(key: str, override: Override, default: Any) -> Any:
    """Returns the value, as what it can only mean. Raises ValueError where it is nothing of the kind that stands there."""
    value = override.value()
    text = str(override.input_line).partition("=")[2]
    if isinstance(default, dict) and "." not in key and not isinstance(value, dict):
        inner = ", ".join(f"{key}.{name}" for name in default)
        raise ValueError(f"{key}={text}: these are the keys of {key}: {inner}; give one of them a value")
    group = key.removesuffix(".name")
    if group != key and group in GROUPS and group != "model" and value != default:
        if (name := text.strip("'\"")) not in choices_of(group):
            raise ValueError(unknown_choice(group, name, choices_of(group)))
        raise ValueError(f"{key}={text}: a choice brings its own keys with it; write {group}={name}")
    if isinstance(default, bool) and not isinstance(value, bool):
        if (meant := YES.get(text.strip("'\"").lower())) is None:
            raise ValueError(f"{key}={text}: give true or false")
        return meant
    if isinstance(default, list) and isinstance(value, dict):
        raise ValueError(f"{key}={text}: give a list, such as [a,b]")
    if text == "None" and not isinstance(default, str):
        return None
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and key not in INTERVALS and isinstance(value, str) and not any(letter.isdigit() for letter in value):
        raise ValueError(f"{key}={text}: give a {'whole ' if isinstance(default, int) else ''}number")
    return value
