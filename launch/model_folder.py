"""`model=FOLDER`: a Hugging Face folder as a model by itself; and `model=FILE.py:NAME`: code of one's own as one, by the word of the
command alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowwise.launch.choices import choices_of
from rowwise.trainer.models.code import check_code, names_code

SETTINGS = "model.settings."  # what stands below it code of one's own knows alone
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # of a model on the hub: owner/name


def as_source(word: str) -> str:
    """`model=FOLDER` of a Hugging Face folder as what it says: that the model begins there, whose config.json says its shape. Raises
    ValueError for the name of a model on the hub."""
    key, _, value = word.partition("=")
    name = value.strip("'\"")
    if key != "model" or name in choices_of("model"):
        return word
    if names_code(name):
        return as_code(word)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or (folder.is_dir() and "/" in name):
        return f"model.init_from={value}"
    if HUB_NAME.fullmatch(name) and not folder.exists():
        local = name.rpartition("/")[2]
        raise ValueError(
            f"model={name}: there is no such folder; if it is a model on the Hugging Face hub, hf download {name} --local-dir {local} "
            f"brings it, and then give model=./{local}"
        )
    return word


def as_code(word: str) -> str:
    """`model=FILE.py:NAME`, or `model=package.module:NAME`, as what it says: a model of that code."""
    key, _, value = word.partition("=")
    return f"model.own={value}" if key == "model" and names_code(value.strip("'\"")) else word


def refuse_named_code(own: Any, words: Sequence[str]) -> None:
    """Refuses code that no word of the command names: an experiment, or a choice of `--config-dir`, does. Raises ValueError."""
    if not isinstance(own, str):
        return
    if not any(word.partition("=")[0].lstrip("+") == "model.own" for word in words):
        raise ValueError(told_of_named("a choice or an experiment", own, f"model.own={own}"))
    check_code(own)


def told_of_named(what: str, own: Any, word: str) -> str:
    """Returns what is said of a file that names code."""
    return (
        f"{what} names code of somebody's own, model.own={own}, which runs by the word of a command alone: look at that code, and "
        f"give {word} too"
    )
