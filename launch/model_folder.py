"""`model=FOLDER`: a Hugging Face folder as a model by itself."""

import re
from pathlib import Path

from rowwise.launch.choices import choices_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # of a model on the hub: owner/name


def as_source(word: str) -> str:
    """`model=FOLDER` of a Hugging Face folder as what it says: that the model begins there, whose config.json says its shape. Raises
    ValueError for the name of a model on the hub."""
    key, _, value = word.partition("=")
    name = value.strip("'\"")
    if key != "model" or name in choices_of("model"):
        return word
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
