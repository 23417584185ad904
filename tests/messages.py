"""Counts what a function sends: numbers per collective, as they pass torch's dispatcher."""

from collections import Counter

import torch
from torch import Tensor

from rowwise.kernels.torch_dispatch import TorchDispatchMode


class Messages(TorchDispatchMode):
    """While entered, `calls` counts collectives by name and `bytes` the bytes of their input tensors on this rank."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            # all-to-all names its output first.
            given = args[1] if name.startswith("alltoall") else args[0]
            self.calls[name] += 1
            self.bytes[name] += sum(t.numel() * t.itemsize for t in _tensors(given))
        return function(*args, **(kwargs or {}))


def _tensors(given) -> list[Tensor]:
    if isinstance(given, torch.Tensor):
        return [given]
    return [t for entry in given for t in _tensors(entry)] if isinstance(given, (list, tuple)) else []
