"""A YAML file of KEY: VALUE, as words of a command line. Nothing of it is run: no tag of YAML, no resolver."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rowwise.launch.choices import GROUPS, choices_of, sections
from rowwise.launch.overrides import KEY, quoted

LARGEST_BYTES = 1_000_000  # of a file of settings


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """Reads a YAML file (or JSON, which is one) of keys and values, as plain data. Raises ValueError."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"{what}: the file has more than {LARGEST_BYTES:,} bytes, as no configuration has")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"{what} cannot be read: {reason}") from None
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.TagToken | yaml.AliasToken | yaml.AnchorToken):
                told = "a tag" if isinstance(token, yaml.TagToken) else "an anchor"
                raise ValueError(
                    f"{what}, line {token.start_mark.line + 1}: {told} of YAML is not read; write the value out"
                )
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode | None):
            raise ValueError(f"{what} holds no KEY: VALUE, such as `optim.lr: 1e-3`")
        # Of this loader 1e-3 is a number, which it is not to YAML 1.1, and a key that stands there twice is an error.
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if root else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML{_place(error)}") from None
    except (OmegaConfBaseException, RecursionError, AttributeError, TypeError):
        raise ValueError(f"{what} is no YAML of KEY: VALUE, such as `optim.lr: 1e-3`") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    where = f": line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{where}: {problem}" if where and problem else where


def words_of(tree: dict[str, Any], what: str, interpolate: bool) -> Iterable[tuple[str, str]]:
    """Writes a tree as key -> word. A group's value is the name of a choice, or a table whose `name` chooses and whose other keys
    are set."""
    if "defaults" in tree:
        raise ValueError(f"{what}: `defaults` is of Hydra's own files; write `optim: adamw8bit` for a choice")
    for key, value in tree.items():
        if not KEY.fullmatch(key) or key == "config":
            raise ValueError(f"{what}: {key!r} is no key; write KEY: VALUE, such as `optim.lr: 1e-3`")
        for full, leaf in _leaves(key, value, what):
            choice = full in GROUPS and isinstance(leaf, str) and re.fullmatch(r"[\w.-]+", leaf)
            yield full, f"{full}={leaf if choice else text_of(leaf, f'{what}: {full}', interpolate)}"


def _leaves(key: str, value: Any, what: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    if not all(isinstance(inner, str) and KEY.fullmatch(inner) for inner in value):
        raise ValueError(f"{what}: the keys of {key} are no names; write KEY: VALUE")
    _refuse_code(value, f"{what}: {key}")
    name = value.get("name")
    chooses = key in GROUPS and isinstance(name, str) and name in choices_of(key)
    if chooses:
        yield key, name
    for inner, leaf in value.items():
        if isinstance(leaf, dict) and key.partition(".")[0] not in sections():
            yield from _leaves(f"{key}.{inner}", leaf, what)
        elif not (chooses and inner == "name"):
            yield f"{key}.{inner}", leaf


def _refuse_code(table: dict[Any, Any], what: str) -> None:
    if "_target_" in table:
        raise ValueError(f"{what} names code by _target_, and none is run from a file; leave it out")


def text_of(value: Any, what: str, interpolate: bool = False) -> str:
    """Returns a value of a file as the value of an override. Raises ValueError."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        if interpolate and re.search(r"\$\{[^}]*:", value):
            raise ValueError(
                f"{what}={value}: a file looks nothing up but keys of the configuration; give it on the command line"
            )
        return quoted(value, interpolate)
    if isinstance(value, list):
        return "[" + ",".join(text_of(one, what, interpolate) for one in value) + "]"
    if isinstance(value, dict):
        _refuse_code(value, what)
        if not all(isinstance(key, str) and KEY.fullmatch(key) for key in value):
            raise ValueError(f"{what}: its keys are no names")
        return "{" + ",".join(f"{key}: {text_of(one, what, interpolate)}" for key, one in value.items()) + "}"
    raise ValueError(
        f"{what}: {type(value).__name__} is no value here; give text, a number, true, false, null or a list"
    )
