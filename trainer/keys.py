"""What is said of a key that does not exist, and of a name that names no folder. Needs no torch: what is mistyped is refused
without waiting for it."""

import difflib


def unknown_key(path: str, possible: list[str]) -> str:
    """The message for a key that does not exist: what is possible, and the nearest."""
    parent, _, key = path.rpartition(".")
    near = difflib.get_close_matches(key, possible, n=1)
    where = f"{parent}" if parent else "the configuration"
    hint = f"; did you mean {parent + '.' if parent else ''}{near[0]}?" if near else ""
    return f"unknown key {path}: {where} has {', '.join(sorted(possible))}{hint}"


def check_folder_name(key: str, name: str) -> None:
    """Raises ValueError where a run or a sweep cannot be called so."""
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"{key}={name!r}: a run name is the name of a folder, and holds no '/'")
