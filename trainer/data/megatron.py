"""Megatron's index (x.idx) of the tokens beside it (x.bin): of what dtype they are, and where documents begin.

bytes   what                                        (NVIDIA's Megatron-LM, core/datasets/indexed_dataset.py)
9       MMIDIDX, two zeros
8       version: 1
1       the number of the dtype
8, 8    S, how many sequences; D, how many borders of documents
4 S     the tokens of each sequence
8 S     the byte of x.bin at which each begins
8 D     the borders of documents, in sequences, from 0 to S
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {1: "uint8", 4: "int32", 5: "int64", 8: "uint16"}  # by Megatron's numbers
_MAGIC = b"MMIDIDX\0\0" + (1).to_bytes(8, "little")
_HEAD = len(_MAGIC) + 1 + 8 + 8


@dataclass(frozen=True)
class Index:
    """What an index says. `path`: its own; `documents`: the tokens at which they begin, ascending, from 0."""

    path: Path
    dtype: str
    documents: np.ndarray


def index_of(tokens: Path) -> Index | None:
    """Reads the index beside a file of tokens; None where there is none. Raises ValueError for one that is not of that file."""
    path = tokens.with_suffix(".idx")
    if tokens.suffix != ".bin" or not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(_MAGIC) or len(head) < _HEAD:
        return None
    if (dtype := DTYPES.get(head[len(_MAGIC)])) is None:
        raise ValueError(f"{path} names the dtype {head[len(_MAGIC)]}, possible are {DTYPES}; write the tokens anew")
    sequences, borders = (int.from_bytes(head[start : start + 8], "little") for start in (_HEAD - 16, _HEAD - 8))
    if _HEAD + 12 * sequences + 8 * borders > path.stat().st_size:
        raise ValueError(f"{path} is cut short: it has not what it says of {sequences:,} sequences; write it again")
    return Index(path, dtype, _documents(path, tokens, sequences, borders, np.dtype(dtype).itemsize))


def _documents(path: Path, tokens: Path, sequences: int, borders: int, itemsize: int) -> np.ndarray:
    """Where documents begin, of sequences that stand one behind another."""
    with path.open("rb") as file:
        file.seek(_HEAD)
        lengths = np.fromfile(file, "<i4", sequences)
        begins = np.fromfile(file, "<i8", sequences)
        at = np.fromfile(file, "<i8", borders)
    ends = np.cumsum(lengths, dtype=np.int64)
    found, said = tokens.stat().st_size // itemsize, int(ends[-1]) if sequences else 0
    if found != said:
        raise ValueError(f"{path} is of {said:,} tokens, and {tokens} has {found:,}; give the two as they were written")
    if lengths.min(initial=0) < 0 or not np.array_equal(begins, (ends - lengths) * itemsize):
        raise ValueError(f"{path}: its sequences do not stand one behind another in {tokens}; write both again")
    if not borders or at[0] != 0 or at[-1] != sequences or np.diff(at).min(initial=0) < 0:
        raise ValueError(f"{path}: its documents do not go from the first sequence to the last; write it again")
    starts = np.concatenate(([0], ends))[at[:-1]]
    return np.unique(np.concatenate(([0], starts[starts < said])))
