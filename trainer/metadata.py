"""The metadata of a checkpoint, read without running what stands in it.

torch writes `.metadata` as a pickle, and a pickle may call any function there is. This one may name the few classes of torch's
own format and nothing else. (What it leads to, the tensors, torch itself reads with `weights_only`; that a checkpoint
holds other objects, which torch would not read so, its metadata would say, with a class that is not among these.)
"""

import pickle
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.metadata import Metadata

from rowwise.trainer import torch_checkpoint

METADATA = ".metadata"
_OURS = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    torch_checkpoint.MemoryFormat,
    torch_checkpoint.StoragePlace,
    torch.Size,
)
_DTYPES = {("torch", name): one for name in dir(torch) if isinstance(one := getattr(torch, name), torch.dtype)}
ADMITTED: dict[tuple[str, str], Any] = {
    **{(one.__module__, one.__qualname__): one for one in _OURS},
    **_DTYPES,
    # pathlib's own home is another from Python 3.13 on
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
    torch_checkpoint.GET_LAYOUT: torch_checkpoint.get_layout,  # a look-up by name
}


class Forbidden(ValueError):
    """A pickle that names what has no place in it."""


_InPython: Any = pickle._Unpickler  # whose steps can be looked at


class _Unpickler(_InPython):
    dispatch: ClassVar = dict(_InPython.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise Forbidden(f"names {module}.{name}, which no checkpoint needs")
        return ADMITTED[module, name]

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):
            raise Forbidden(f"changes the class {self.stack[-2].__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint, its metadata as `read_metadata` does. For every `dcp.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_metadata(Path(self.path))
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def read_metadata(checkpoint: Path) -> Metadata:
    """Says which rows of which tensor stand where. Raises ValueError where the file is not the metadata of a checkpoint,
    naming what else it would have run, or leads out of the checkpoint's folder."""
    path = checkpoint / METADATA
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        _check(found)
    except Forbidden as error:
        raise ValueError(
            f"{path} {error}: it may have been made to run code; take the checkpoint from who saved it"
        ) from None
    except Exception as error:  # of the many that bytes which are no pickle make
        raise ValueError(f"{path} is not the metadata of a checkpoint ({error or type(error).__name__})") from None
    return found


def _check(found: Any) -> None:
    if not isinstance(found, Metadata):
        raise Forbidden(f"holds a {type(found).__name__}")
    for index, info in (found.storage_data or {}).items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(info, torch_checkpoint.StoragePlace):
            raise Forbidden(f"holds a {type(info).__name__} where a tensor's place belongs")
        if Path(info.relative_path).name != info.relative_path:
            raise Forbidden(f"leads out of its folder, to {info.relative_path}")
    for name, told in found.state_dict_metadata.items():
        if not isinstance(told, metadata.TensorStorageMetadata):
            raise Forbidden(f"holds a {type(told).__name__} as {name}")
