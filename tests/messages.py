"""Counts what a function sends: numbers per collective, as they pass torch's dispatcher."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
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


@dataclass
class Crossed:
    """Bytes of a rank's collectives, the whole of what each moves: those whose ranks are of several machines, and of one."""

    gathered_outside: int = 0
    gathered_inside: int = 0
    reduced_outside: int = 0
    reduced_inside: int = 0


@contextmanager
def crossings(machine: int) -> Iterator[Crossed]:
    """While entered, counts gathers and reductions of flat buffers by the ranks that they are between, where so many neighbours are
    a machine: of an all-gather its output, of a reduce-scatter or an all-to-all its input."""
    crossed = Crossed()

    def counted(name: str, kind: str, of: str, place: int) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
            tensor = kwargs[of] if of in kwargs else args[place]
            outside = len({rank // machine for rank in dist.get_process_group_ranks(group or dist.group.WORLD)}) > 1
            field = f"{kind}_{'outside' if outside else 'inside'}"
            setattr(crossed, field, getattr(crossed, field) + tensor.nbytes)
            return original(*args, group=group, **kwargs)

        return mock.patch.object(dist, name, call)

    with ExitStack() as stack:
        # torch has renamed two of them; FSDP2 calls the new names where there are.
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if hasattr(dist, name):
                stack.enter_context(counted(name, "gathered", "output_tensor", 0))
        for name in ("reduce_scatter_tensor", "reduce_scatter_single", "all_to_all_single"):
            if hasattr(dist, name):
                stack.enter_context(counted(name, "reduced", "input", 1))
        yield crossed
