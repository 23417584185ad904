"""What is used of torch's dispatcher beyond what torch documents: all of it is here. torch's notes on extending it explain
`TorchDispatchMode`, by which every operation is looked at, and give it no other home than this.

`_should_skip_dynamo`       a mode's own code is hidden from torch's compiler, which is imported for that, more than a second in a
                            process that compiles nothing, and told so at every operation; what is looked at here is not compiled
`_schema`                   whether what an operation gives is an argument of it, or a view of one
`_storage_Use_Count`        how many tensors and names hold a storage
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from rowwise.kernels.torch_dtensor import rows_of


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):
    """Looks at every operation of what is not compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of an operation by its schema: `makes`, whether it gives anything that is not said to be an argument of it or a
    view of one; `moves`, whether it is of those that cross ranks, or of FSDP2's."""

    name: str
    makes: bool
    moves: bool


_told: dict[int, Told] = {}  # by identity, since operations stay: to find one by its hash would take longer


def told_of(function: Any) -> Told:
    """Gives what is known of an operation."""
    found = _told.get(id(function))
    if found is None:
        makes = any(given.alias_info is None for given in function._schema.returns)
        found = _told[id(function)] = Told(function.name(), makes, function.namespace in ("c10d", "fsdp"))
    return found


def is_held_once(storage: torch.UntypedStorage) -> bool:
    """Tells whether one tensor alone has a storage, beside whoever asks."""
    return torch._C._storage_Use_Count(storage._cdata) <= 2


def storages(given: Any) -> list[Any]:
    """Lists the storages of all tensors in what an operation takes or gives."""
    if isinstance(given, Tensor):
        return [given.untyped_storage() if type(given) is Tensor else rows_of(given).untyped_storage()]
    if isinstance(given, dict):
        given = list(given.values())
    return [storage for one in given for storage in storages(one)] if isinstance(given, list | tuple) else []
