"""What is used of torch's storages beyond what torch documents: all of it is here. Two tensors are the same numbers in memory where
their storage, place, length and version are; torch tells of no other name that a storage has than its address."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def storage_key(t: Tensor) -> int:
    """Names the storage of `t` among all that live, and those that a `StorageWeakRef` knows of."""
    return t.untyped_storage()._cdata


def memory_key(t: Tensor) -> tuple[int, ...]:
    """Names the memory of `t`, and what was last written there."""
    return storage_key(t), int(t.storage_offset()), t.numel(), t._version


def weak_storage(t: Tensor) -> StorageWeakRef:
    """Refers to the storage of `t` without keeping its memory; its name is not given to another meanwhile."""
    return StorageWeakRef(t.untyped_storage())
