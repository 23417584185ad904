"""Files that are there whole or not at all, whoever reads them and whatever ends the one that writes; JSON that every reader
takes; and full disks."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DiskFull(Exception):
    """A file system has no room left, or a user no quota on it. The message says which, and what was being written."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskFull, naming `path` and its file system, where what is done inside fails for want of room."""
    try:
        yield
    except BaseException as error:
        cause = want_of_room(error)
        if cause is None:
            raise
        raise cause if isinstance(cause, DiskFull) else DiskFull(_described(path, cause)) from None


def want_of_room(error: BaseException) -> BaseException | None:
    """Returns what says that a file system, or a quota, is full, of all that stands behind `error`: libraries raise others on its
    heels, and torch.distributed.checkpoint keeps those of all ranks in one. None where nothing does."""
    for one in behind(error):
        if isinstance(one, DiskFull) or (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)):
            return one
        if os.strerror(errno.ENOSPC) in str(one) and not hasattr(one, "failures"):  # safetensors, from Rust
            return one
    return None


def behind(error: BaseException) -> Iterator[BaseException]:
    """Returns `error`, and all that it came from."""
    met: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or one in met:
            continue
        yield one
        met.append(one)
        left += [one.__cause__, one.__context__]
        left += [failure for failure, _ in getattr(one, "failures", {}).values()]


def _described(path: Path, cause: BaseException) -> str:
    mount = path.absolute()
    while not (mount.is_dir() and mount.is_mount()):
        mount = mount.parent
    if isinstance(cause, OSError) and cause.errno == errno.EDQUOT:
        return f"disk full: the quota on {mount} is used up, writing {path}"
    files = os.statvfs(mount)
    if files.f_files and not files.f_favail:  # 0 of 0: it does not count them
        return f"disk full: {mount} has room for no more files, of {files.f_files:,} (df -i), writing {path}"
    room = shutil.disk_usage(mount)
    return f"disk full: {mount} has {room.free >> 10:,} KiB of {room.total >> 20:,} MiB free, writing {path}"


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path` under this process's own name, and renames once the disk has it. Raises DiskFull."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with writing(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Removes whatever is there: a folder with all that is in it, a file, or a link, but not what that leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Makes a folder that is there whole or not at all: what is done inside fills `final`.incomplete, which then gets its name, or
    is removed where it fails. What an interrupted one left is removed. Raises ValueError where it cannot be made, and DiskFull."""
    partial = final.with_name(final.name + ".incomplete")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"to={final} cannot be written ({error.strerror}); give another folder") from None
    try:
        with writing(final):
            yield partial
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def free_name(path: Path) -> Path:
    """Returns `path`-1, or the first number that is free."""
    return next(free for n in range(1, 1 << 30) if not os.path.lexists(free := path.with_name(f"{path.name}-{n}")))


def full_path(path: str, key: str) -> Path:
    """Returns `path` with the home folder in place of its `~`. Raises ValueError where there is none of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{key}={path}: there is no such user's home; give the whole path") from None


def to_json(tree: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Returns a plain tree as JSON, which has no word for NaN and infinity: they are null."""
    return json.dumps(_finite(tree), indent=indent, sort_keys=sort_keys, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Returns the tree in `text`; NaN and Infinity, which others write, are None. Raises ValueError for all that is no JSON."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deep") from None


def fingerprint(tree: Any) -> str:
    """Returns the SHA-256 of a plain tree."""
    return hashlib.sha256(to_json(tree, sort_keys=True).encode()).hexdigest()


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    return [_finite(value) for value in tree] if isinstance(tree, list | tuple) else tree
