"""A checkpoint that one process writes, of tensors that are read or made when their turn comes: one is in memory at a time."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from rowwise.trainer.files import writing
from rowwise.trainer.manifest import FileFacts, file_facts
from rowwise.trainer.writer import Writer

Read = Callable[[str], Tensor]


def save_one_by_one(folder: Path, tensors: Mapping[str, Tensor], read: Read) -> dict[str, FileFacts]:
    """Writes into `folder`, which exists and is empty, tensors like those on the meta device, as `read` gives them by their names, in
    any shape and dtype. Returns the facts of the files."""
    with writing(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        # A file each: torch keeps all that goes into one until it is closed.
        writer = Writer(folder, single_file_per_rank=False)
        dcp.save(dict(tensors), storage_writer=writer, planner=_OneByOne(read, tensors), no_dist=True)
    return {path.name: file_facts(path) for path in sorted(folder.iterdir())}


class _OneByOne(dcp.DefaultSavePlanner):
    """Reads a tensor when its turn comes to be written, in the shape and dtype of that on the meta device."""

    def __init__(self, read: Read, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._read, self._tensors = read, tensors

    def lookup_object(self, index: MetadataIndex) -> Any:
        like = self._tensors[index.fqn]
        return self._read(index.fqn).view(like.shape).to(like.dtype)
