"""Files that are there whole or not at all, whoever reads them and whatever ends the one that writes."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path` under this process's own name, then renames."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
