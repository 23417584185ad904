"""Counts the bytes of what operations made and that still lives: activations, gradients, messages."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def plain_tensors(tree) -> list[Tensor]:
    """All tensors in a tree that have a storage."""
    return [t for t in tree_leaves(tree) if type(t) in (Tensor, torch.nn.Parameter)]


class LiveBytes(TorchDispatchMode):
    """While entered, knows the storages that operations made and that still live."""

    def __init__(self):
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in plain_tensors((*args, *(kwargs or {}).values()))}
        for t in plain_tensors(result):
            storage = t.untyped_storage()
            if storage._cdata not in given:  # else a view, or written in place
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        return sum(size for _, size in self._made.values())
