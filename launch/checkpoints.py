"""The checkpoint of a run that a command is to read: named by its step or path, or the newest that is sound. Needs no torch."""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rowwise.trainer.manifest import Manifest, damage, find_checkpoints, read_manifest, step_folder

Weights = Literal["average", "last"]


@dataclass(frozen=True)
class Sound:
    """A checkpoint whose checksums are right, and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest["step"]


def choose_sound(run: str | Path, choice: str | None, key: str = "checkpoint") -> Sound:
    """Chooses the checkpoint `choice` (a step, or a path) of a run, or the newest that is sound. Says what it passes over. `key`:
    what the choice was given as. Raises ValueError where none is sound."""
    candidates, complaints = candidates_of(run, choice, key), []
    for checkpoint in candidates:
        try:
            return examined(checkpoint)
        except ValueError as damaged:
            complaints.append(str(damaged))
        if checkpoint != candidates[-1]:
            print(f"{complaints[-1]}; passed over", file=sys.stderr)
    raise ValueError(f"{complaints[-1]}; no sound checkpoint is left, give another {key}= or run=")


def examined(checkpoint: Path) -> Sound:
    """Returns a checkpoint, compared with its checksums. Raises ValueError, naming it, where it is damaged."""
    try:
        manifest = read_manifest(checkpoint)
        found = damage(checkpoint, manifest["files"].items())
    except ValueError as error:
        raise ValueError(f"{checkpoint} is damaged: {error}") from None
    if found:
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(found)}")
    return Sound(checkpoint, manifest)


def means_last(manifest: Manifest, weights: Weights | None) -> bool:
    """Says whether the weights of the last step are meant, of a checkpoint that may have an average. Raises ValueError where it has
    none and that is asked for."""
    if weights == "average" and average_of(manifest) is None:
        raise ValueError(
            f"weights=average: at step {manifest['step']} the run kept none (average.ema=null); give weights=last, or leave it out"
        )
    return weights == "last"


def average_of(manifest: Manifest) -> float | None:
    """Returns the `average.ema` that the run had; None where it kept no average."""
    config: Mapping[str, Any] = manifest["config"]
    return config.get("average", {}).get("ema")


def candidates_of(run: str | Path, choice: str | None, key: str = "checkpoint") -> list[Path]:
    """Returns the checkpoints of a run, the newest first, sound or not; or the one that `choice` names, by its step or path. Raises
    ValueError, naming what is possible, where there is none."""
    folder = Path(run).expanduser()
    found = find_checkpoints(folder)
    if not found:
        near = (_runs_in(place) for place in (folder, folder.parent, Path("runs")))
        others = next((runs for runs in near if runs), [])
        hint = f"possible are {_some(others)}" if others else "give a folder that a training run wrote"
        raise ValueError(f"run={run}: there is no checkpoint; {hint}")
    if choice is None:
        return found
    if choice.isdigit():
        name = step_folder(folder, int(choice)).name
        chosen = [checkpoint for checkpoint in found if checkpoint.name == name]
    else:
        path = Path(choice).expanduser().resolve()
        chosen = [checkpoint for checkpoint in found if checkpoint.resolve() == path]
    if not chosen:
        possible = _some([checkpoint.name for checkpoint in found])
        raise ValueError(f"{key}={choice}: not one of run={run}; possible are {possible}")
    return chosen


def _runs_in(folder: Path) -> list[str]:
    """What in a folder has checkpoints; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(str(path) for path in folder.iterdir() if _holds_some(path))
    return []


def _some(names: list[str]) -> str:
    """At most ten of many."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _holds_some(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(find_checkpoints(folder))
    except (OSError, ValueError):  # another's, which is not asked for
        return False
