"""Corpus folders of the first releases, whose records have neither a version nor hashes of the files.

Their `fingerprint` is a hash of the tokens and of where documents end, so that hashes can be made of the files once it is known that
they are what was written.
"""

import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rowwise.trainer.data.integrity import (
    END_OF_DOCUMENT,
    FILES,
    META,
    SPLITS,
    Contents,
    DataDamaged,
    Record,
    contents_of,
    read_tree,
    write_record,
)

_KEYS = {"dtype", "vocab_size", "fingerprint", "tokens"}


def record_of_earlier(folder: Path) -> Record | None:
    """Returns the record of a corpus folder of an earlier release: with hashes, which are then beside its files; without, and to be
    told, where the folder cannot be written. None where it is of this release. Raises DataDamaged."""
    tree = read_tree(folder)
    if tree.keys() != _KEYS:
        return None
    _require_sound(folder, tree)
    paths = [folder / name for name in FILES]
    if not os.access(folder, os.W_OK):
        return Record(**tree, files={path.name: Contents(path.stat().st_size, []) for path in paths})
    if tree["fingerprint"] != fingerprint_of(folder, tree["dtype"]):
        raise DataDamaged(f"{folder} is damaged: its files do not have the fingerprint that {META} beside them holds")
    record = Record(**tree, files={path.name: contents_of(path) for path in paths})
    write_record(folder, record)
    print(
        f"{folder} is of an earlier release: its files are as they were written, and {META} now holds their hashes",
        file=sys.stderr,
        flush=True,
    )
    return record


def fingerprint_of(folder: Path, dtype: str) -> str:
    """Says what the record of a corpus that is read from its files would have. Raises DataDamaged."""
    digests = []
    for split in SPLITS:
        path, content = folder / f"{split}.bin", hashlib.sha256()
        try:
            # numpy cannot map nothing.
            tokens = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
            starts = np.load(folder / f"{split}.documents.npy", mmap_mode="r", allow_pickle=False)
            for start, end in itertools.pairwise(itertools.chain(starts, [len(tokens)]) if len(tokens) else []):
                content.update(tokens[start:end].data)
                content.update(END_OF_DOCUMENT)
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise DataDamaged(f"{path} or what is beside it is damaged ({str(error).splitlines()[0]})") from None
        digests.append(content.hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _require_sound(folder: Path, tree: dict[str, Any]) -> None:
    counts = tree["tokens"]
    sound = (
        tree["dtype"] in ("uint8", "uint16", "uint32")
        and isinstance(tree["fingerprint"], str)
        and isinstance(counts, dict)
        and counts.keys() == set(SPLITS)
        and all(type(number) is int and number >= 0 for number in (tree["vocab_size"], *counts.values()))
    )
    if not sound:
        raise DataDamaged(f"{folder / META} is damaged: it is no record of a corpus")
    for name in FILES:
        if not (folder / name).is_file():
            raise DataDamaged(f"{folder / name} is missing")
    for split, count in counts.items():
        path, expected = folder / f"{split}.bin", count * np.dtype(tree["dtype"]).itemsize
        if (size := path.stat().st_size) != expected:
            raise DataDamaged(f"{path} is damaged: it has {size:,} bytes, and {META} beside it says {expected:,}")
