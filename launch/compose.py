"""Hydra groups and command-line overrides -> a plain tree, with errors of one line."""

import contextlib
import copy
import functools
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from rowwise.launch.answers import unknown_choice, unknown_keys
from rowwise.launch.choices import GROUPS, check_folder, choices_of, tree_of_files
from rowwise.launch.fitting import fitting
from rowwise.launch.model_folder import SETTINGS, as_source, refuse_named_code
from rowwise.launch.overrides import SEARCHPATH, parse, spelt
from rowwise.trainer.keys import refuse_control_characters, told_of_type, unknown_key
from rowwise.trainer.models.config_json import read_shape, refuse_other_shape
from rowwise.trainer.run_length import choose, settle

Part = TypeVar("Part")


def compose_tree(overrides: Sequence[str]) -> dict[str, Any]:
    """Composes the resolved configuration. Raises ValueError with what was given, what is possible, what to change."""
    overrides = [as_source(word) for word in overrides]
    read = [parse(word) for word in overrides]
    own = _own_folders(read)
    choices = tuple(filter(None, (_choice(one, own) for one in read if one.key_or_group in (*GROUPS, SEARCHPATH))))
    values = [override for override in read if override.key_or_group not in (*GROUPS, SEARCHPATH)]
    chosen, tree = _chosen(choices)
    checked = _checked(tree, values)
    config: DictConfig = pickle.loads(chosen)
    with _looked_up(values):
        for key, value in checked:
            OmegaConf.update(config, key, value, merge=True, force_add=f"{key}.".startswith(SETTINGS))
    _take_shape_(config, list(overrides))
    with _looked_up(values):
        resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    refuse_named_code(resolved["model"]["own"], overrides)
    given = [key_of(override) for override in overrides]
    return settle(choose({str(key): value for key, value in resolved.items()}, given))


@contextlib.contextmanager
def _conf(name: str) -> Iterator[None]:
    """conf/ as what Hydra composes of; also inside a trial of its multirun, of which it then knows again."""
    known = GlobalHydra.instance()
    outer = known.hydra
    known.clear()
    try:
        with initialize_config_module("rowwise.conf", version_base="1.3", job_name=name):
            yield
    finally:
        known.hydra = outer


def _own_folders(overrides: Sequence[Override]) -> tuple[str, ...]:
    """The folders of --config-dir. Raises ValueError for what is wrong in them, and for other settings of Hydra's own."""
    found: list[str] = []
    for override in overrides:
        key, value = str(override.key_or_group), override.value()
        if key == SEARCHPATH and isinstance(value, list) and all(str(one).startswith("file://") for one in value):
            found += [str(one).removeprefix("file://") for one in value]
        elif key.startswith(("hydra.", "hydra/")) or "/" in key:
            raise ValueError(
                f"{override.input_line}: a run sets what is Hydra's own itself; give run_dir for its folder, --config-dir DIR for "
                "groups of your own, and leave this out"
            )
    for folder in dict.fromkeys(found):
        check_folder(Path(folder))
    return tuple(dict.fromkeys(found))


def _choice(override: Override, own: tuple[str, ...]) -> str:
    """A choice of a group that exists; empty for no experiment. Raises ValueError."""
    group, value = str(override.key_or_group), override.value()
    if group == SEARCHPATH:
        return str(override.input_line)
    if override.is_sweep_override():
        raise ValueError(_of_a_sweep(override))
    if isinstance(value, Mapping):
        raise ValueError(f"{override.input_line}: give {group}=NAME, and each key by itself, such as {group}.KEY=VALUE")
    name = override.get_value_element_as_str() if value is not None else "null"
    name = value.text if isinstance(value, QuotedString) else name.strip("'\"")
    if group == "experiment" and value is None:
        return ""
    if name not in (possible := choices_of(group, own)):
        raise ValueError(unknown_choice(group, name, possible))
    return f"{group}={name}"


def _of_a_sweep(override: Override) -> str:
    line = str(override.input_line)
    key, _, value = line.partition("=")
    return f"{line}: several values are a sweep's, rowwise sweep {line}; a list is {key}=[{value}], and text {key}=\"'{value}'\""


def _checked(tree: dict[str, Any], values: Sequence[Override]) -> list[tuple[str, Any]]:
    """Keys and values of overrides, for the composed `tree`. Raises ValueError for keys that it does not have."""
    found: list[tuple[str, Any]] = []
    unknown: list[tuple[str, str]] = []
    for override in values:
        key = str(override.key_or_group)
        if override.is_sweep_override():
            raise ValueError(_of_a_sweep(override))
        value, default = override.value(), _at(tree, key)
        if _has(tree, key) and isinstance(value, dict) and isinstance(default, dict):
            found += [(f"{key}.{inner}", leaf) for inner, leaf in value.items() if inner in default]
            unknown += [(f"{key}.{inner}", str(leaf)) for inner, leaf in value.items() if inner not in default]
        elif _has(tree, key):
            found.append((key, fitting(key, override, default)))
        elif key.startswith(SETTINGS) and "." not in key.removeprefix(SETTINGS):
            found.append((key, value))
        else:
            unknown.append((key, str(override.input_line).partition("=")[2]))
    if unknown:
        known = copy.deepcopy(tree)
        for key, value in found:
            *path, last = key.split(".")
            if isinstance(node := _at(known, ".".join(path)), dict):
                node[last] = value
        raise ValueError(unknown_keys(unknown, known))
    return found


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def _at(tree: Any, key: str) -> Any:
    for part in filter(None, key.split(".")):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


@contextlib.contextmanager
def _looked_up(values: Sequence[Override]) -> Iterator[None]:
    """Raises ValueError for a ${KEY} that leads nowhere."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        lines = {str(one.key_or_group): str(one.input_line) for one in values if "${" in str(one.input_line)}
        word = lines.get(key) or next(iter(lines.values()), key or "the configuration")
        raise ValueError(
            f"{word}: what stands in ${{...}} is not there; give a key of the configuration, ${{oc.env:NAME}} of a variable that "
            "is set, or \\${ for the characters themselves"
        ) from None


@functools.cache
def _chosen(choices: tuple[str, ...]) -> tuple[bytes, dict[str, Any]]:
    """What choices come to, as a DictConfig in a pickle, which is copied in a sixth of the time of the object, and as a plain tree:
    once in a process, for a sweep checks many trials of the same. Hydra, which takes its time, is asked only where files say more
    than keys and values. Raises ValueError."""
    setup_globals()  # ${now:...}, and what else Hydra looks up
    tree: Any = tree_of_files(choices)
    if tree is None:
        try:
            with _conf("train"):
                tree = OmegaConf.to_container(compose("train", overrides=list(choices)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(
                f"{' '.join(choices) or 'conf/'}: these cannot be composed: {_first_line(error)}"
            ) from None
    return pickle.dumps(OmegaConf.create(tree, flags={"struct": True})), tree


def _take_shape_(config: DictConfig, overrides: list[str]) -> None:
    """Where `model.init_from` names a folder, the folder says the model's shape, and its name is the model's: what stands
    in conf/ as a default gives way, and what was given (`model=`, `model.*`, an experiment's) must agree. Raises
    ValueError."""
    source = OmegaConf.select(config, "model.init_from", throw_on_resolution_failure=False)
    if not isinstance(source, str):
        return
    folder, words = Path(source).expanduser(), {key_of(override) for override in overrides}
    theirs, default = read_shape(folder), _chosen(())[1]["model"]
    ours: Any = OmegaConf.to_container(config.model)
    if isinstance(ours["rope_scaling"], dict):
        ours["rope_scaling"].setdefault("kind", "llama3")
    given = [key for key in theirs if {"model", f"model.{key}"} & words or ours[key] != default[key]]
    if ours["head_dim"] == theirs["dim"] // theirs["heads"]:
        theirs["head_dim"] = theirs["head_dim"] or ours["head_dim"]  # it may be said
    given = [key for key in given if key != "family" or ours[key] is not None]
    refuse_other_shape(folder, {key: (theirs[key], ours[key]) for key in given})
    config.model.update(theirs)
    if ours["name"] == default["name"] and not {"model", "model.name"} & words:
        config.model.name = folder.resolve().name


def compose_part(name: str, kind: type[Part], overrides: list[str]) -> tuple[Part, DictConfig]:
    """Composes what stands below `name` in conf/NAME.yaml with these overrides, as the dataclass `kind`, strictly; and Hydra's own
    settings there. Raises ValueError."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    read = [parse(word) for word in overrides]
    for override in read:
        key = str(override.key_or_group)
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in names:
            raise ValueError(unknown_key(key, names))
        if override.is_sweep_override():
            raise ValueError(f"{override.input_line}: {key} has one value, not several")
    tree, hydra = _part(name, tuple(overrides))
    refuse_control_characters(tree, name)
    try:
        # As JSON, because strict validation of Python objects would ask for instances instead of trees.
        return TypeAdapter(kind).validate_json(json.dumps(tree), strict=True), hydra
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise ValueError(f"{where}={first['input']!r}: {told_of_type(first)}") from None


@functools.cache
def _part(name: str, overrides: tuple[str, ...]) -> tuple[Any, DictConfig]:
    """What stands below `name`, as a plain tree, and Hydra's own settings: once in a process. Raises ValueError."""
    read = [parse(word) for word in overrides]
    with _conf(name):
        _refuse_unknown_choices(read)
        try:
            composed = compose(name, overrides=[spelt(one) for one in read], return_hydra_config=True)
            return OmegaConf.to_container(composed[name], resolve=True), composed.hydra
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error, name, read)) from None


def _refuse_unknown_choices(overrides: Sequence[Override]) -> None:
    """Of Hydra's own groups, such as hydra/launcher, of which plugins bring choices."""
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    for override in overrides:
        group, value = str(override.key_or_group), override.value()
        if "/" in group and value not in (possible := loader.get_group_options(group)):
            raise ValueError(unknown_choice(group, str(value), possible))


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _explain(error: BaseException, name: str, overrides: Sequence[Override]) -> str:
    """One line out of Hydra's many. Unknown keys get the message that unknown keys get everywhere."""
    for override in overrides:
        key = str(override.key_or_group)
        if "/" not in key and f"'{key.rpartition('.')[2]}'" in str(error).replace(key, key.rpartition(".")[2]):
            choices = [spelt(one) for one in overrides if "/" in str(one.key_or_group)]
            node: Any = compose(name, overrides=choices, return_hydra_config=True)
            for part in key.split(".")[:-1]:
                node = node.get(part) if isinstance(node, DictConfig) and part in node else None
            return unknown_key(
                key, [str(one) for one in node] if isinstance(node, DictConfig) else ["nothing below it"]
            )
    return f"{' '.join(spelt(one) for one in overrides)}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].removesuffix(".") if str(error) else type(error).__name__
