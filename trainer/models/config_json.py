"""A Hugging Face config.json and the model.* keys that it describes. Needs no torch: what is wrong with a folder to start
from is said without waiting for it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rowwise.trainer.files import from_json
from rowwise.trainer.keys import as_lists
from rowwise.trainer.models.families.keys import family_of, read_keys, write_keys

if TYPE_CHECKING:
    import torch

    from rowwise.trainer.models.config import ModelConfig

FORMS = ("dense", "condensed", "semi_structured")  # of hidden weights: see `trainer.models.forms`
FORM, _TYPE = "rowwise_form", "rowwise_"


def their_config(
    config: "ModelConfig", dtype: "torch.dtype", max_positions: int, end_token: int | None
) -> dict[str, Any]:
    """Returns the config.json of a model, in the form that transformers 4 and 5 both read. Raises ValueError for a model that is of no
    family."""
    keys = as_lists(asdict(config))
    return {
        **write_keys(keys, family_of(keys)),
        "max_position_embeddings": max_positions,
        "dtype": str(dtype).removeprefix("torch."),
        # Text of Rowwise has no token that begins it or fills it up; transformers would otherwise assume the family's.
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": end_token,
    }


def with_form(config_json: dict[str, Any], form: str) -> dict[str, Any]:
    """Returns the config.json of a model whose hidden weights are in one of FORMS. transformers refuses the model type of all but
    `dense`: it would replace tensors that it does not find by random ones."""
    if form == "dense":
        return config_json
    return config_json | {"model_type": _TYPE + config_json["model_type"], "architectures": [], FORM: form}


def without_form(config_json: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns what `with_form` made a config.json of, and the form."""
    form = config_json.get(FORM, "dense")
    return config_json | {"model_type": config_json["model_type"].removeprefix(_TYPE)}, form


def our_keys(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the model.* keys that a config.json describes, as plain values; `family` where they alone do not say it. Raises
    ValueError for what our decoder does not have."""
    keys = read_keys(theirs)
    return keys | {"family": None} if family_of(keys | {"family": None}) == keys["family"] else keys


def read_shape(folder: Path) -> dict[str, Any]:
    """Reads the model.* keys that the config.json of a folder describes; `head_dim` only where it is not dim / heads. Raises
    ValueError."""
    with refusing(folder):
        keys = our_keys(read_config(folder))
        implied = keys["head_dim"] == keys["dim"] // keys["heads"]
        return keys | ({"head_dim": None} if implied else {})


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder. Raises OSError and ValueError."""
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file. Raises OSError and ValueError."""
    tree = from_json(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return tree


def refuse_other_shape(folder: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Refuses another shape: raises ValueError where a model.* key is not the same in the folder and in what was given: pairs of
    both."""
    different = [f"model.{key}={there} there and {here} here" for key, (there, here) in pairs.items() if there != here]
    with refusing(folder):
        if different:
            raise ValueError(f"it is another model, {', '.join(different)}")


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Raises what is wrong with a folder to start from as one ValueError."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"model.init_from={folder}: its JSON has no key {error}; complete the folder") from None
    except (OSError, ValueError, SafetensorError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"model.init_from={folder}: {error}; give a Hugging Face folder (config.json and safetensors) of this "
            "model, or leave out model= and the model.* keys that the folder says itself"
        ) from None
