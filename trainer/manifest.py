"""Checkpoints as files: what is complete, what is damaged, what may go. Knows nothing of tensors.

runs/NAME/checkpoints/step-00000100/               a checkpoint; it exists once it has this name and a manifest
    manifest.json                                  written last
    .metadata  __0_0.distcp  __1_0.distcp  ...     torch distributed checkpoint, one file a rank
runs/NAME/checkpoints/step-00000200.incomplete/    a save under way, or one that was interrupted
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_INCOMPLETE = ".incomplete"


@dataclass(frozen=True)
class CheckpointConfig:
    """`every`: steps between saves (0 = only at the end and when asked to stop); `keep`: how many of the newest stay
    (0 = all); `background`: write while training goes on."""

    every: int = 100
    keep: int = 2
    background: bool = True

    def due(self, step: int, steps: int) -> bool:
        return step == steps or (self.every > 0 and step % self.every == 0)


def check_checkpoint(config: CheckpointConfig) -> None:
    """Raises ValueError for a number below 0."""
    if config.every < 0 or config.keep < 0:
        raise ValueError(
            f"checkpoint.every={config.every} checkpoint.keep={config.keep}: steps between saves (0 = only at the end), "
            "and how many stay (0 = all)"
        )


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints that exist, the newest first."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def newest_sound(checkpoints: Path) -> Path | None:
    """The newest checkpoint that has a sound manifest and every file, in its size; checksums are left to who resumes."""
    for checkpoint in complete_checkpoints(checkpoints):
        with contextlib.suppress(ValueError, OSError):
            files = read_manifest(checkpoint)["files"].items()
            if all((checkpoint / name).stat().st_size == facts["bytes"] for name, facts in files):
                return checkpoint
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError where it cannot be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest.pop("checksum") != fingerprint(manifest):
            raise ValueError("its own checksum differs")
        return manifest
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} is damaged ({error or type(error).__name__})") from None


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to save `step` into. What interrupted saves left behind is removed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    clear_interrupted(checkpoints)
    folder = incomplete_folder(checkpoints, step)
    folder.mkdir()
    return folder


def clear_interrupted(checkpoints: Path) -> None:
    """Removes what interrupted saves left behind."""
    for stale in checkpoints.glob(f"*{_INCOMPLETE}"):
        shutil.rmtree(stale)


def incomplete_folder(checkpoints: Path, step: int) -> Path:
    final = step_folder(checkpoints, step)
    return final.with_name(final.name + _INCOMPLETE)


def commit(folder: Path, manifest: dict[str, Any]) -> Path:
    """Makes a saved folder a checkpoint: the manifest, then the name. `manifest["files"]` must list every file.

    Raises RuntimeError where a file that some rank wrote is not seen from here.
    """
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise RuntimeError(
                f"{path} was written by another rank and is not seen by rank 0: run_dir must be on a "
                "file system that all machines share"
            )
    partial = folder / (MANIFEST + _INCOMPLETE)
    with partial.open("w") as file:
        json.dump({**manifest, "checksum": fingerprint(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)
    _sync_folder(folder)
    final = folder.with_name(folder.name.removesuffix(_INCOMPLETE))
    if final.exists():  # a folder that lost its manifest, and so is no checkpoint
        shutil.rmtree(final)
    folder.rename(final)
    _sync_folder(final.parent)
    return final


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all but the `keep` newest. The name goes first, so that no half-removed folder is a checkpoint, and what
    a crash leaves of one is cleared by the next save."""
    for old in complete_checkpoints(checkpoints)[keep:] if keep else []:
        shutil.rmtree(old.rename(old.with_name(old.name + _INCOMPLETE)))


def set_aside(checkpoints: Path, beyond: int) -> None:
    """Renames the checkpoints of later steps than `beyond`, from which a run goes on: they were damaged and passed over,
    and must neither be resumed nor counted among the newest."""
    for later in complete_checkpoints(checkpoints):
        if int(later.name.split("-")[1]) > beyond:
            aside = later.with_name(later.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def damage(checkpoint: Path, files: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """What is wrong with these files of a checkpoint, a phrase each."""
    found = []
    for name, facts in files:
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != facts["bytes"]:
            found.append(f"{name} has {size} bytes instead of {facts['bytes']}")
        elif file_facts(path)["sha256"] != facts["sha256"]:
            found.append(f"{name} differs from its checksum")
    return found


def find_checkpoints(path: Path) -> list[Path]:
    """What a user may name: a checkpoint, or a folder of them, or a run. The newest first."""
    if (path / MANIFEST).is_file():
        return [path]
    return complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")


def fingerprint(tree: Any) -> str:
    """SHA-256 of a plain tree."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
