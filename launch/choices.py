"""The choices of the groups: the files of conf/, and those of a user's own folder (`--config-dir`), which is YAML only."""

import functools
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

GROUPS = (
    "model", "data", "optim", "schedule", "parallel", "precision", "memory", "sparsity", "adapter", "checkpoint", "tracker",
    "experiment",
)  # fmt: skip


@functools.cache
def choices_of(group: str, own: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the names that a group may be given, in ours and in the folders `own`."""
    folders = [Path(str(files("rowwise.conf"))), *map(Path, own)]
    return tuple(sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")}))


@functools.cache
def keys_of(group: str) -> dict[str, frozenset[str]]:
    """Returns choice of ours -> the keys it has."""
    folder = Path(str(files("rowwise.conf"))) / group
    return {name: frozenset(yaml.safe_load((folder / f"{name}.yaml").read_text()) or ()) for name in choices_of(group)}


@functools.cache
def tree_of_files(choices: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns what GROUP=NAME... come to, read from conf/ as Hydra composes it in ten times the time; None where files say more than
    keys and values (an experiment), and Hydra is to be asked."""
    tree = _file("train")
    chosen = {group: name for one in tree["defaults"] if isinstance(one, dict) for group, name in one.items()}
    chosen |= dict(choice.split("=", 1) for choice in choices)
    if chosen.pop("experiment") or not chosen.keys() <= set(GROUPS):
        return None
    groups = {group: _file(f"{group}/{name}") for group, name in chosen.items()}
    if any("defaults" in group for group in groups.values()):
        return None
    return groups | {key: value for key, value in tree.items() if key != "defaults"}


@functools.cache
def _file(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(Path(str(files("rowwise.conf")), f"{name}.yaml").read_text())
    return tree


@functools.cache
def sections() -> frozenset[str]:
    """Returns the keys of a command line that have keys below them."""
    return frozenset(
        {*GROUPS, "sweep", "slurm", *(key for key, value in _file("train").items() if isinstance(value, dict))}
    )


def check_folder(folder: Path) -> None:
    """Refuses a folder of choices that holds anything but groups of ours, a choice that has the name of one of
    ours (which it would not replace), or settings of Hydra's own, which can name code."""
    what = f"--config-dir {folder}"
    if not folder.is_dir():
        raise ValueError(f"{what}: there is no such folder")
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")) or not (path.is_dir() or path.suffix in (".yaml", ".yml")):
            continue
        if path.name not in GROUPS or not path.is_dir():
            raise ValueError(
                f"{what}: {path.name} is no group; possible are folders of the name of {', '.join(GROUPS)}"
            )
        for file in sorted(path.iterdir()):
            _check_choice(file, path.name)


def _check_choice(path: Path, group: str) -> None:
    if path.suffix != ".yaml":
        raise ValueError(f"{path} is no .yaml file, and a choice is one")
    if path.stem in choices_of(group):
        raise ValueError(f"{path}: {group}={path.stem} is one of ours; give the file another name")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.TagToken | yaml.AnchorToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError(f"{path} holds a tag or an anchor of YAML, which are not read; write the value out")
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise ValueError(f"{path} cannot be read as YAML") from None
    if re.search(r"\$\{[^}]*:", text):
        raise ValueError(f"{path}: a file looks nothing up but keys of the configuration; give it on the command line")
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    if (package and package[1] not in ("_global_", "_group_", group)) or _names_code(tree):
        raise ValueError(
            f"{path} holds settings of Hydra's own, or names code, and none is run from there; leave them out"
        )


def _names_code(tree: Any) -> bool:
    """Whether a key is `_target_` or of Hydra's, or the list of defaults goes there."""
    if isinstance(tree, list):
        return any(_names_code(value) for value in tree)
    if not isinstance(tree, dict):
        return False
    return any(
        key == "_target_" or "hydra" in str(key) or _names_code(value) or (key == "defaults" and _leaves_groups(value))
        for key, value in tree.items()
    )


def _leaves_groups(defaults: Any) -> bool:
    return any(word in str(defaults) for word in ("hydra", "${", "@", ".."))
