"""Hydra groups and command-line overrides -> a plain tree, with errors of one line."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rowwise.trainer.config import unknown_key


def compose_tree(overrides: list[str]) -> dict[str, Any]:
    """The composed, resolved configuration. Raises ValueError with what was given, what is possible, what to change."""
    with initialize_config_module("rowwise.conf", version_base="1.3", job_name="train"):
        try:
            tree = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error)) from None
    assert isinstance(tree, dict)
    return tree


def _explain(error: BaseException) -> str:
    """One line out of Hydra's many. Unknown keys get the message that unknown keys get everywhere."""
    cause: BaseException | None = error
    while cause is not None:
        if (key := getattr(cause, "full_key", None)) and "not in struct" in str(cause):
            return unknown_key(key, _siblings(key))
        cause = cause.__cause__
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _siblings(key: str) -> list[str]:
    """The keys that stand where `key` was looked for, in the default configuration."""
    node: Any = compose("train")
    for part in key.split(".")[:-1]:
        node = node[part]
    return [str(name) for name in node]


def choices(group: str) -> list[str]:
    """The files of a configuration group."""
    import importlib.resources

    return sorted(Path(str(f)).stem for f in importlib.resources.files("rowwise.conf").joinpath(group).iterdir())
