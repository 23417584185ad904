"""Whether a run of a user's own model goes on with what the checkpoint was saved with."""

from pathlib import Path

from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.manifest_form import Manifest
from rowwise.trainer.metadata import read_metadata
from rowwise.trainer.models.code import print_of_code


def refuse_other_code(checkpoint: Path, manifest: Manifest, config: TrainConfig) -> None:
    """Refuses code that makes other parameters than the checkpoint has, and code where it is of none. (That it moves
    is no matter.) Raises ValueError."""
    here, there = config.model.own, manifest["config"]["model"].get("own")
    if (here is None) != (there is None):
        raise ValueError(
            f"checkpoint {checkpoint} is of another model: model.own={there} there and {here} here; give the same, or another name"
        )
    if here is None:
        return
    held = read_metadata(checkpoint).state_dict_metadata
    for name, spec in run_specs(config).items():
        size = getattr(held.get(f"model.{name}"), "size", None)
        if size != spec.shape and spec.kept is None:
            raise ValueError(
                f"checkpoint {checkpoint} is of another model: {name} is {size and tuple(size)} there and {tuple(spec.shape)} as "
                f"model.own={here} makes it; give the code that it was saved with, or another name"
            )


def told_of_code(manifest: Manifest, own: str | None) -> list[str]:
    """Returns what is said where the file of a user's own model, `own`, is not what it was when the checkpoint of `manifest` was
    saved. (Which checkpoints of earlier releases do not know.)"""
    there = manifest["fingerprint"].get("code")
    if own is None or there in (None, print_of_code(own)):
        return []
    return [
        f"warning: the code of model.own={own} has changed since step {manifest['step']} was saved; its parameters are the "
        "same, and what it makes of them may not be"
    ]
