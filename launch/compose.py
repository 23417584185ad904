"""Hydra groups and command-line overrides -> a plain tree, with errors of one line."""

import copy
import functools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from rowwise.trainer.keys import refuse_control_characters, unknown_key
from rowwise.trainer.models.config_json import read_shape, refuse_other_shape
from rowwise.trainer.run_length import choose, settle

Part = TypeVar("Part")

GROUPS = (
    "model", "data", "optim", "schedule", "parallel", "precision", "sparsity", "checkpoint", "tracker", "experiment",
)  # fmt: skip


def compose_tree(overrides: list[str]) -> dict[str, Any]:
    """The composed, resolved configuration. Raises ValueError with what was given, what is possible, what to change."""
    _refuse_more_than_lines(overrides)
    with initialize_config_module("rowwise.conf", version_base="1.3", job_name="train"):
        try:
            config = _composed(overrides)
            _take_shape_(config, overrides)
            tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error, overrides)) from None
    assert isinstance(tree, dict)
    given = [key_of(override) for override in overrides]
    return settle(choose({str(key): value for key, value in tree.items()}, given))


def _composed(overrides: list[str]) -> DictConfig:
    """What Hydra composes. It takes its time for the choices of groups: each is composed once in a process, and values are
    put into a copy of it, for a sweep checks many trials of the same choices. What is no such value, and what is wrong, is
    Hydra's to read."""
    choices = tuple(override for override in overrides if override.partition("=")[0] in GROUPS)
    try:
        values = OverridesParser.create().parse_overrides([word for word in overrides if word not in choices])
        if all(_is_value(override) for override in values):
            config = copy.deepcopy(_chosen(choices))
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
            return config
    except (HydraException, OmegaConfBaseException):
        pass
    return compose("train", overrides=overrides)


def _is_value(override: Override) -> bool:
    plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return plain and not override.key_or_group.startswith(("hydra.", "hydra/"))


@functools.cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return compose("train", overrides=list(choices))


def _take_shape_(config: DictConfig, overrides: list[str]) -> None:
    """Where `model.init_from` names a folder, the folder says the model's shape, and its name is the model's: what stands
    in conf/ as a default gives way, and what was given (`model=`, `model.*`, an experiment's) must agree. Raises
    ValueError."""
    source = OmegaConf.select(config, "model.init_from")
    if not isinstance(source, str):
        return
    folder, words = Path(source).expanduser(), {key_of(override) for override in overrides}
    theirs, default = read_shape(folder), compose("train").model
    ours: Any = OmegaConf.to_container(config.model)
    given = [key for key in theirs if {"model", f"model.{key}"} & words or ours[key] != default[key]]
    if ours["head_dim"] == theirs["dim"] // theirs["heads"]:
        theirs["head_dim"] = theirs["head_dim"] or ours["head_dim"]  # it may be said
    refuse_other_shape(folder, {key: (theirs[key], ours[key]) for key in given})
    config.model.update(theirs)
    if ours["name"] == default.name and not {"model", "model.name"} & words:
        config.model.name = folder.resolve().name


def compose_part(name: str, kind: type[Part], overrides: list[str]) -> tuple[Part, DictConfig]:
    """What stands below `name` in conf/NAME.yaml with these overrides, as the dataclass `kind`, strictly; and Hydra's own
    settings there. Raises ValueError."""
    _refuse_more_than_lines(overrides)
    for override in overrides:
        key, names = key_of(override), [field.name for field in fields(kind)]  # type: ignore[arg-type]
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in names:
            raise ValueError(unknown_key(key, names))
    with initialize_config_module("rowwise.conf", version_base="1.3", job_name=name):
        try:
            composed = compose(name, overrides=overrides, return_hydra_config=True)
            tree = OmegaConf.to_container(composed[name], resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(one_line(error)) from None
    refuse_control_characters(tree, name)
    try:
        # As JSON, because strict validation of Python objects would ask for instances instead of trees.
        return TypeAdapter(kind).validate_json(json.dumps(tree), strict=True), composed.hydra
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise ValueError(f"{where}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _refuse_more_than_lines(overrides: list[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_control_characters({key: value})


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def quoted(value: str) -> str:
    """As the value of an override that means these characters and nothing else."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return "'" + escaped.replace("${", "\\${") + "'"


def one_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _explain(error: BaseException, overrides: list[str]) -> str:
    """One line out of Hydra's many. Unknown keys get the message that unknown keys get everywhere."""
    cause: BaseException | None = error
    while cause is not None:
        if (key := getattr(cause, "full_key", None)) and "not in struct" in str(cause):
            return unknown_key(key, _siblings(key, overrides))
        cause = cause.__cause__
    return one_line(error)


def _siblings(key: str, overrides: list[str]) -> list[str]:
    """The keys that stand where `key` was looked for, under the choices of groups that were made."""
    chosen = [override for override in overrides if override.partition("=")[0] in GROUPS]
    node: Any = compose("train", overrides=chosen)
    for part in key.split(".")[:-1]:
        node = node[part] if OmegaConf.is_config(node) else None
    return [str(name) for name in node] if OmegaConf.is_config(node) else ["nothing below it"]
