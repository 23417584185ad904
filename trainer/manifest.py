"""Checkpoints as files: what is complete, what is damaged, what may go. Knows nothing of tensors.

runs/NAME/checkpoints/step-00000100/               a checkpoint; it exists once it has this name and a manifest
    manifest.json                                  written last
    .metadata  __0_0.distcp  __1_0.distcp  ...     torch distributed checkpoint, one file a rank (or two: see trainer.writer)
runs/NAME/checkpoints/step-00000200.incomplete/    a save under way, or one that was interrupted
runs/NAME/checkpoints/step-00000300.damaged/       one that was passed over by a run that went on
runs/NAME/checkpoints/step-00000300.rolled-back/   one of steps that a spike made the run go back from
runs/NAME/.saved                                   a checkpoint has existed: where there is none, it was lost
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.optim.lengths import RunLength
from rowwise.trainer.files import fingerprint, free_name, from_json, remove, to_json, write_whole
from rowwise.trainer.manifest_form import VERSION, FileFacts, Manifest

SAVED = ".saved"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_INCOMPLETE = ".incomplete"


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


class OtherVersion(ValueError):
    """A sound manifest, in a form that this release does not know."""


@dataclass(frozen=True)
class CheckpointConfig:
    """`every`: how often it is saved (an interval, also of time; 0: only at the end and when asked to stop). `keep`: how
    many of the newest stay (0: all). `background`: write while training goes on."""

    every: MayChange[int | float | str] = 100
    keep: MayChange[int] = 2
    background: MayChange[bool] = True

    def due(self, step: int, run: RunLength) -> bool:
        """Says whether the step alone says so; where `every` is a time, rank 0's clock may too."""
        return step == run.steps or run.due(self.every, step)


CHECKPOINTS: Refusals = (
    Refusal(
        ("checkpoint.keep",),
        lambda run: run.checkpoint.keep < 0,
        "checkpoint.keep={checkpoint.keep}: how many of the newest checkpoints stay (0 = all)",
    ),
)


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Returns the step of a folder that has the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def step_folders(checkpoints: Path) -> list[Path]:
    """Lists all that has the name of a checkpoint, the newest first: also what has lost its manifest. Raises ValueError where
    `checkpoints` cannot be read."""
    try:
        names = [path.name for path in checkpoints.iterdir()]
    except OSError as error:
        if not os.path.lexists(checkpoints):
            return []
        if checkpoints.is_symlink() and isinstance(error, FileNotFoundError):
            raise ValueError(
                f"{checkpoints} is a link to {checkpoints.readlink()}, which is not there: mount that disk, or remove the link"
            ) from None
        raise ValueError(f"{checkpoints} cannot be read ({error.strerror}): mend it, or give another name") from None
    found = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    return [checkpoints / name for name in sorted(found, key=found.__getitem__, reverse=True)]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Returns the checkpoints that exist, the newest first; sound or not."""
    return [folder for folder in step_folders(checkpoints) if _is_there(folder / MANIFEST)]


def _is_there(path: Path) -> bool:
    """Also where the disk does not say what it is."""
    try:
        return path.is_file()
    except OSError:
        return True


def newest_sound(checkpoints: Path) -> Path | None:
    """Returns the newest checkpoint that has a sound manifest and every file, in its size; checksums are left to who resumes."""
    with contextlib.suppress(ValueError):
        for checkpoint in complete_checkpoints(checkpoints):
            with contextlib.suppress(ValueError, OSError):
                files = read_manifest(checkpoint)["files"].items()
                if all((checkpoint / name).stat().st_size == facts["bytes"] for name, facts in files):
                    return checkpoint
    return None


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads the manifest of a checkpoint. Raises ValueError where it cannot be read, or is none; OtherVersion where another
    release of Rowwise wrote it."""
    path = checkpoint / MANIFEST
    try:
        tree = from_json(path.read_bytes())
        if not isinstance(tree, dict) or tree.pop("checksum", None) != fingerprint(tree):
            raise ValueError("its own checksum differs")
        if tree.get("version", VERSION) != VERSION:
            raise OtherVersion(
                f"{path} is of version {tree['version']}, and this release reads {VERSION}: go on with the release that wrote it"
            )
        manifest = _MANIFEST.validate_python(tree)
        step = _NAME.fullmatch(checkpoint.name)
        if manifest["step"] != manifest["state"]["step"] or (step and int(step[1]) != manifest["step"]):
            raise ValueError(f"it is of step {manifest['step']}")
        if any(Path(name).name != name for name in manifest["files"]):
            raise ValueError("its files are elsewhere")
        return manifest
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{MANIFEST} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})") from None
    except OtherVersion:
        raise
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from None


def begin(checkpoints: Path, step: int) -> Path:
    """Returns an empty folder to save `step` into. What interrupted saves left behind is removed. Not made anew is the run's own
    folder: it was moved away."""
    checkpoints.mkdir(exist_ok=True)
    clear_interrupted(checkpoints)
    folder = incomplete_folder(checkpoints, step)
    folder.mkdir()
    return folder


def clear_interrupted(checkpoints: Path) -> None:
    """Removes what interrupted saves left behind."""
    for stale in checkpoints.glob(f"*{_INCOMPLETE}"):
        remove(stale)


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
    manifest = {"version": VERSION, **manifest}
    write_whole(folder / MANIFEST, to_json({**manifest, "checksum": fingerprint(manifest)}, indent=1))
    _sync_folder(folder)
    final = folder.with_name(folder.name.removesuffix(_INCOMPLETE))
    if os.path.lexists(final):
        _put_aside(final)
    folder.rename(final)
    (final.parent.parent / SAVED).touch()
    _sync_folder(final.parent)
    return final


def prune(checkpoints: Path, keep: int, is_anchor: Callable[[int], bool] = lambda step: False) -> None:
    """Removes all but the `keep` newest, and the newest whose step `is_anchor`. The name goes first, so that no half-removed
    folder is a checkpoint, and what a crash leaves of one is cleared by the next save."""
    found = complete_checkpoints(checkpoints)
    anchor = next((one for one in found if is_anchor(step_of(one))), None)
    for old in found[keep:] if keep else []:
        if old != anchor:
            remove(old.rename(old.with_name(old.name + _INCOMPLETE)))


def set_aside(checkpoints: Path, beyond: int, why: Literal["damaged", "rolled-back"] = "damaged") -> None:
    """Renames the checkpoints of later steps than `beyond`, from which a run goes on: they were damaged and passed over, or
    are of what was rolled back, and must neither be resumed nor counted among the newest."""
    for later in step_folders(checkpoints):
        if step_of(later) > beyond:
            _put_aside(later, why)


def is_rolled_back(checkpoint: Path) -> bool:
    """Says whether there was a checkpoint by this name, and it was put aside by a rollback."""
    return not os.path.lexists(checkpoint) and os.path.lexists(checkpoint.with_name(f"{checkpoint.name}.rolled-back"))


def _put_aside(checkpoint: Path, why: str = "damaged") -> None:
    aside = checkpoint.with_name(f"{checkpoint.name}.{why}")
    checkpoint.rename(free_name(aside) if os.path.lexists(aside) else aside)


def file_facts(path: Path) -> FileFacts:
    """Returns size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def damage(checkpoint: Path, files: Iterable[tuple[str, FileFacts]]) -> list[str]:
    """Returns what is wrong with these files of a checkpoint, a phrase each."""
    found = []
    for name, facts in files:
        try:
            size = (checkpoint / name).stat().st_size
            if size != facts["bytes"]:
                found.append(f"{name} has {size} bytes instead of {facts['bytes']}")
            elif file_facts(checkpoint / name)["sha256"] != facts["sha256"]:
                found.append(f"{name} differs from its checksum")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def find_checkpoints(path: Path) -> list[Path]:
    """Finds what a user may name: a checkpoint, or a folder of them, or a run. The newest first, with those that have lost their
    manifest. Raises ValueError where the folder cannot be read."""
    if path.is_file():
        return []
    if _is_there(path / MANIFEST):
        return [path]
    return step_folders(path) or step_folders(path / "checkpoints")


def had_checkpoints(run_dir: Path) -> bool:
    """Says whether the run there has ever saved one."""
    return _is_there(run_dir / SAVED)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
