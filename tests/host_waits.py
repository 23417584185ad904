"""Where a step would make the host wait for a GPU, counted on the CPU.

A GPU works behind the host for as long as nobody looks at a number. What looks (`item`, `tolist`, `numpy`, `cpu`, a tensor
as a condition, whatever gives as many results as some numbers say, `eigh` and `copy` from unpinned memory) waits until all
that was asked before is done. On a CPU the same calls cost nothing, and are counted here, each with the lines of the
product that made it.
"""

import functools
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rowwise.kernels.torch_dispatch import TorchDispatchMode

ROOMS = ("kernels", "launch", "optim", "parallel", "trainer")
ROOT = Path(__file__).parents[1]
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
# By the names of their operators; those of a mask as an index have no other sign.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "_linalg_eigh", "bincount",
           "is_nonzero", "repeat_interleave"}  # fmt: skip


@functools.cache
def is_ours(filename: str) -> bool:
    """Whether a file is the product's: src/rowwise links to the rooms."""
    return any(Path(filename).resolve().is_relative_to(ROOT / room) for room in ROOMS)


class HostWaits:
    """While entered, `sites` gets the lines of the product that led to each wait. Tensors of `host` are the host's own."""

    def __init__(self, host: Iterable[Tensor] = ()):
        self.sites: list[str] = []
        self._host = {t.data_ptr() for t in host}
        self._copies: list[Tensor] = []  # so that no other tensor gets their place
        self._modes = [_Functions(self), _Operators(self)]

    def __enter__(self) -> "HostWaits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def keep(self, copy: Tensor) -> None:
        """From here on `copy` is the host's own."""
        self._copies.append(copy)
        self._host.add(copy.data_ptr())

    def add(self, what: str, tensor: Any = None) -> None:
        if isinstance(tensor, Tensor) and tensor.data_ptr() in self._host:
            return
        ours = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
        self.sites.append(" > ".join([f"{Path(f.filename).name}:{f.lineno}" for f in ours[-3:]] + [what]))


class _Functions(TorchFunctionMode):
    """What passes no dispatcher on the CPU: a copy to where the tensor is, or a look at its memory."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in READS:
            self._waits.add(function.__name__, args[0])
            if function is Tensor.cpu:  # a copy, which the host may look at
                copy = args[0].detach().clone()
                self._waits.keep(copy)
                return copy
        elif function is Tensor.to and not kwargs.get("non_blocking") and _to_device(args[1:], kwargs):
            self._waits.add("a copy to a device that is waited for", args[0])
        elif function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self._waits.add("a copy of the host's numbers")
        return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if name in WAITING or masks:
            self._waits.add(name, args[0])
        return function(*args, **(kwargs or {}))


def _to_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None or any(isinstance(a, (torch.device, str)) for a in args)
