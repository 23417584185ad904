"""What is used of torch's dispatcher beyond what torch documents: all of it is here. torch's notes on extending it explain
`TorchDispatchMode`, by which every operation is looked at, and give it no other home than this.

`_should_skip_dynamo`       a mode's own code is hidden from torch's compiler, which is imported for that, more than a second in a
                            process that compiles nothing, and told so at every operation; what is looked at here is not compiled
`_schema`                   whether what an operation gives is an argument of it, or a view of one
`_storage_Use_Count`        how many tensors and names hold a storage
"""

import weakref
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from rowwise.kernels.torch_dtensor import rows_of


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):
    """Looks at every operation of what is not compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


Entry = TypeVar("Entry")


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


class Births(TorchDispatchMode, Generic[Entry]):
    """While entered, knows every storage that operations make from when it is made until it is let go: `there`, by identity, with
    what is noted of it."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, tuple[weakref.ref[Any], Entry]] = {}

    def begun(self, size: int, operation: str) -> Entry:
        """Says what is noted of a storage of so many bytes that an operation has made."""
        raise NotImplementedError

    def ended(self, noted: Entry) -> None:
        """Learns that a storage is let go of."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs) if kwargs else function(*args)
        told = told_of(function)
        if told.makes:
            for storage in storages(result):
                if is_held_once(storage) or not any(storage is given for given in storages((args, kwargs))):
                    self.note_birth(storage, told.name)
        return result

    def note_birth(self, storage: Any, operation: str) -> None:
        """Notes a storage that was not there."""
        if (key := id(storage)) not in self.there:
            noted = self.begun(storage.nbytes(), operation)
            self.there[key] = weakref.ref(storage, lambda _: self.note_death(key)), noted

    def note_death(self, key: int) -> None:
        """Forgets a storage; nothing happens where it is not known."""
        if (found := self.there.pop(key, None)) is not None:
            self.ended(found[1])
