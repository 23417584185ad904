"""Counts the bytes of what operations made and that still lives: activations, gradients, messages."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from rowwise.kernels.torch_dispatch import TorchDispatchMode


def plain_tensors(tree) -> list[Tensor]:
    """All tensors in a tree that have a storage."""
    return [t for t in tree_leaves(tree) if type(t) in (Tensor, torch.nn.Parameter)]


ALL_TO_ALL = torch.ops.c10d.alltoall_base_.default


class LiveBytes(TorchDispatchMode):
    """While entered, knows the storages that operations made and that still live; and, unless `peaks` is false, what they came
    to at most, for which all are looked at after every operation."""

    def __init__(self, peaks: bool = True):
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._peaks, self.peak = peaks, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = _exchange(*args) if function is ALL_TO_ALL else function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in plain_tensors((*args, *(kwargs or {}).values()))}
        for t in plain_tensors(result):
            storage = t.untyped_storage()
            if storage._cdata not in given:  # else a view, or written in place
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._peaks:
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self._made = {key: (ref, size) for key, (ref, size) in self._made.items() if not ref.expired()}
        return sum(size for _, size in self._made.values())


def _exchange(came: Tensor, sent: Tensor, *how):
    """An all-to-all of copies, which is done when it returns. Gloo's own thread lets go of its tensors some time after the
    message is there, and the longer after, the busier the machine; of the copies nobody counts that."""
    copy_came, copy_sent = torch.empty_like(came), sent.clone()
    work = ALL_TO_ALL(copy_came, copy_sent, *how)
    work.wait()
    came.copy_(copy_came)
    return work
