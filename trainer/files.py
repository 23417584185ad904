"""Files that are there whole or not at all, whoever reads them and whatever ends the one that writes; and full disks."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
    """What says that a file system, or a quota, is full, of all that stands behind `error`: libraries raise others on its
    heels, and torch.distributed.checkpoint keeps those of all ranks in one. None where nothing does."""
    met: list[BaseException] = []
    behind: list[BaseException | None] = [error]
    while behind:
        one = behind.pop()
        if one is None or one in met:
            continue
        if isinstance(one, DiskFull) or (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)):
            return one
        if os.strerror(errno.ENOSPC) in str(one) and not hasattr(one, "failures"):  # safetensors, from Rust
            return one
        met.append(one)
        behind += [one.__cause__, one.__context__]
        behind += [failure for failure, _ in getattr(one, "failures", {}).values()]
    return None


def _described(path: Path, cause: BaseException) -> str:
    mount = path.absolute()
    while not (mount.is_dir() and mount.is_mount()):
        mount = mount.parent
    if isinstance(cause, OSError) and cause.errno == errno.EDQUOT:
        return f"disk full: the quota on {mount} is used up, writing {path}"
    room = shutil.disk_usage(mount)
    return f"disk full: {mount} has {room.free >> 10:,} KiB of {room.total >> 20:,} MiB free, writing {path}"


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path` under this process's own name, then renames. Raises DiskFull."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with writing(path):
            partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
