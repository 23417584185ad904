"""Hydra groups and command-line overrides -> a plain tree, with errors of one line."""

from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rowwise.trainer.config import unknown_key

GROUPS = (
    "model",
    "data",
    "optim",
    "schedule",
    "parallel",
    "precision",
    "sparsity",
    "checkpoint",
    "tracker",
    "experiment",
)


def compose_tree(overrides: list[str]) -> dict[str, Any]:
    """The composed, resolved configuration. Raises ValueError with what was given, what is possible, what to change."""
    with initialize_config_module("rowwise.conf", version_base="1.3", job_name="train"):
        try:
            tree = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error, overrides)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _explain(error: BaseException, overrides: list[str]) -> str:
    """One line out of Hydra's many. Unknown keys get the message that unknown keys get everywhere."""
    cause: BaseException | None = error
    while cause is not None:
        if (key := getattr(cause, "full_key", None)) and "not in struct" in str(cause):
            return unknown_key(key, _siblings(key, overrides))
        cause = cause.__cause__
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _siblings(key: str, overrides: list[str]) -> list[str]:
    """The keys that stand where `key` was looked for, under the choices of groups that were made."""
    chosen = [override for override in overrides if override.partition("=")[0] in GROUPS]
    node: Any = compose("train", overrides=chosen)
    for part in key.split(".")[:-1]:
        node = node[part] if OmegaConf.is_config(node) else None
    return [str(name) for name in node] if OmegaConf.is_config(node) else ["nothing below it"]
