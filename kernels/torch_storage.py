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


def written(t: Tensor) -> int:
    """Counts how often something was written into the memory of `t`."""
    return int(t._version)


def require_unwritten(t: Tensor, before: int) -> Tensor:
    """Returns `t`, which was kept when its memory had been written `before` times: torch asks this of what it keeps itself, and of
    nothing that passes through hooks. Raises RuntimeError."""
    if written(t) != before:
        raise RuntimeError(
            f"a tensor {tuple(t.shape)} that a layer needs in its backward was changed in place after it was kept; have the layer "
            "make a new one"
        )
    return t


def memory_of(t: Tensor) -> Tensor | None:
    """The memory that the numbers of `t` fill, as a flat view; None where they do not lie side by side."""
    strides = t.stride()
    order = sorted(range(t.ndim), key=lambda dim: -strides[dim])
    lying = t.detach().permute(order)
    return lying.flatten() if lying.is_contiguous() and t.numel() else None


def is_part(t: Tensor) -> bool:
    """Whether the numbers of `t` lie among others, each once: heads of what an all-to-all brought, say."""
    return t.nbytes < t.untyped_storage().nbytes() and memory_of(t) is None
