"""Where a checkpoint of DeepSpeed is, and in which form. Needs no torch: what is no such folder is refused at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rowwise.trainer.manifest import find_checkpoints

LATEST = {"latest": "save_checkpoint", "latest_universal": "ds_to_universal"}  # and what of DeepSpeed's writes it


@dataclass(frozen=True)
class Found:
    """A folder, and whether it is a run of `ours`, or a checkpoint of DeepSpeed as engines of `zero` save it, or `universal`."""

    folder: Path
    form: Literal["ours", "zero", "universal"]


def find(given: str) -> Found:
    """Finds what `from=` names: a run or a checkpoint of ours, what `save_dir` of DeepSpeed is, or one folder in it. Raises
    ValueError."""
    folder = Path(given).expanduser()
    if find_checkpoints(folder):
        return Found(folder, "ours")
    if (found := _form(folder)) is not None:
        return found
    for name in LATEST:
        if (folder / name).is_file():
            return _latest(folder, name)
    raise ValueError(
        f"from={given}: there is no checkpoint; give a run, or a folder in which DeepSpeed has saved (it holds latest or "
        "latest_universal, or *_optim_states.pt, or zero/)"
    )


def is_deepspeeds(folder: Path) -> bool:
    """Says whether a folder is what DeepSpeed saved, or holds that."""
    return _form(folder) is not None or any((folder / name).is_file() for name in LATEST)


def _latest(folder: Path, name: str) -> Found:
    with (folder / name).open(encoding="utf-8", errors="replace") as file:
        tag = file.read(1000).strip()
    if not tag or tag in (".", "..") or Path(tag).name != tag or not tag.isprintable():
        raise ValueError(f"{folder / name} names no folder beside it; give from= that of the checkpoint itself")
    found = _form(folder / tag)
    if found is None:
        raise ValueError(
            f"{folder / name} names {tag}, and there is no checkpoint of ZeRO 1, 2 or 3 in {folder / tag}: of ZeRO 0 there is "
            "nothing to put together, and its weights are in it as torch saves them (model.init_from takes safetensors)"
        )
    return found


def _form(folder: Path) -> Found | None:
    if (folder / "zero").is_dir():
        return Found(folder, "universal")
    if next(folder.glob("*zero_pp_rank_*_optim_states.pt"), None) is not None:
        return Found(folder, "zero")
    return None
