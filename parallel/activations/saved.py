"""The seam between a block and what autograd keeps of it: every result passes here once on its way from forward to backward.

While a block runs, `torch.autograd.graph.saved_tensors_hooks` show each tensor that its operators keep. Tensors that are the
same numbers in the same memory are one *result*, kept once, in the form and at the place that the run asks for
(`compress`, `offload`); what an operator gets back in the backward is a view of it. Parameters, integers, and what all blocks
share (the tables of rotary positions) pass as they are. The forward itself is not touched.

It is outermost round a block: hooks further in, which have some results made again (`recompute`), hand over what stays.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rowwise.kernels.torch_storage import (
    StorageWeakRef,
    is_part,
    memory_key,
    memory_of,
    require_unwritten,
    storage_key,
    weak_storage,
    written,
)
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.activations.store import Store

LEAST_BYTES = 1024  # of what is worth moving
_HANDLE = "kept_results"
# What is made again in a backward is made in the context of its forward: others may have come between.
_FIRST: ContextVar[int | None] = ContextVar("first sequence", default=None)


class Readers:
    """Those who wait for one tensor: it is made for the first of them, and let go of by the last who is still there."""

    def __init__(self, make: Callable[[], Tensor]):
        self._make = make
        self._waiting: weakref.WeakSet[Kept] = weakref.WeakSet()
        self._made: Tensor | None = None

    def add(self, reader: "Kept") -> None:
        self._waiting.add(reader)

    def read(self, reader: "Kept") -> Tensor:
        self._waiting.discard(reader)
        made = self._make() if self._made is None else self._made
        self._made = made if self._waiting else None
        return made


class Stored:
    """What is kept of a block once, whoever keeps it. `held` gives the tensors that it is kept as, `rebuild` makes its memory of
    them, flat. `read` knows it by what was read. Who waits for it keeps it, and not the other way round: it goes with the last of
    them, and not when Python looks for circles."""

    def __init__(
        self, held: Callable[[], Sequence[Tensor]], rebuild: Callable[[Sequence[Tensor]], Tensor], read: "Read"
    ):
        self._held, self._rebuild, self._read = held, rebuild, read
        self._readers: weakref.WeakValueDictionary[bool, Readers] = weakref.WeakValueDictionary()

    def readers(self, later: bool = False) -> Readers:
        """Names those who read it in the backward, or those who do `later`, where weight gradients are put off."""
        if (readers := self._readers.get(later)) is None:
            readers = self._readers[later] = Readers(self._make)
        return readers

    def _make(self) -> Tensor:
        memory = self._rebuild(self._held())
        self._read.add(memory, self)
        return memory


class Read:
    """Which results the tensors are of that operators of the backward have."""

    def __init__(self) -> None:
        self._results: dict[int, tuple[StorageWeakRef, weakref.ref[Stored]]] = {}

    def add(self, memory: Tensor, result: Stored) -> None:
        self._results = {key: entry for key, entry in self._results.items() if not entry[0].expired()}
        self._results[storage_key(memory)] = weak_storage(memory), weakref.ref(result)

    def hold(self, t: Tensor) -> Callable[[], Tensor]:
        """Keeps `t` on in the form and place of its result, if it is of one, and returns what gives it."""
        _, known = self._results.get(storage_key(t), (None, None))
        stored = known() if known is not None else None
        if stored is None:
            return lambda: t
        kept = Kept(t)
        kept.become(stored.readers(later=True))
        return kept.read


class Kept:
    """A tensor that an operator keeps: itself, or a view of a result's memory."""

    def __init__(self, tensor: Tensor):
        self._tensor: Tensor | None = tensor.detach()  # an output that held itself would never be freed
        self._readers: Readers | None = None
        self._view, self._written = (tensor.shape, tensor.stride()), written(tensor)

    def become(self, readers: Readers) -> None:
        """Makes it a view of what these read, from now on."""
        self._tensor, self._readers = None, readers
        readers.add(self)

    def read(self) -> Tensor:
        if self._readers is None:
            assert self._tensor is not None
            return require_unwritten(self._tensor, self._written)
        return self._readers.read(self).as_strided(*self._view)


class Form(Protocol):
    """In which form results are kept; one for each forward of a block."""

    def of(self, t: Tensor, learns: bool) -> "Formed | None":
        """Says how to keep a result of which `t` is a view; None: as it is. `learns`: it has a gradient."""


@dataclass(frozen=True)
class Formed:
    """How a result is kept: the tensors that `make` makes of its memory, and `rebuild`, which makes it of them."""

    make: Callable[[Tensor], Sequence[Tensor]]
    rebuild: Callable[[Sequence[Tensor]], Tensor]


AS_IT_IS = Formed(lambda memory: (memory,), lambda tensors: tensors[0])


class Scope:
    """One forward of a block: what it keeps, and what only passes. `shared`: what other blocks are given too."""

    def __init__(self, form: Form | None, store: Store | None, read: Read, block: nn.Module, shared: Sequence[Any]):
        self.form, self._store, self._read = form, store, read
        self._block, self._shared = block, shared
        self._passes: set[int] | None = None
        self._results: dict[tuple[int, ...], tuple[StorageWeakRef, Stored]] = {}
        self._waiting: list[tuple[Tensor, bool, bool, Kept]] | None = None

    def pack(self, t: Tensor) -> Kept:
        """Gives what autograd is to have in the place of a tensor."""
        return self.keep(t.detach(), t.requires_grad)

    def keep(self, t: Tensor, learns: bool, leaves: bool = True) -> Kept:
        """Keeps `t` in the form and at the place of its result. `learns`: it has a gradient, as what layers make has. `leaves`: its
        place is the store, if there is one."""
        if leaves and self._store is not None and is_part(t):
            t = t.contiguous()  # of what came with it nothing could leave
        kept = Kept(t)
        if not t.is_floating_point() or storage_key(t) in self._passing():
            return kept
        if self._waiting is not None:
            self._waiting.append((t, learns, leaves, kept))
        elif (stored := self._stored(t, learns, leaves)) is not None:
            kept.become(stored.readers())
        return kept

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Only notes what operators keep, until it is left: the caller finds out meanwhile what it is."""
        waiting: list[tuple[Tensor, bool, bool, Kept]] = []
        self._waiting = waiting
        try:
            yield
        finally:
            self._waiting = None
        for t, learns, leaves, kept in waiting:
            if (stored := self._stored(t, learns, leaves)) is not None:
                kept.become(stored.readers())

    def _stored(self, t: Tensor, learns: bool, leaves: bool) -> Stored | None:
        """What the memory of `t` is stored as, if need be from now on; None: `t` stays as it is."""
        key, memory = memory_key(t), memory_of(t)
        if memory is None or key in self._results:
            return self._results[key][1] if memory is not None else None
        formed = self.form.of(t, learns) if self.form is not None else None
        store = self._store if leaves else None
        if formed is None and (store is None or memory.nbytes < LEAST_BYTES):
            return None
        formed = formed or AS_IT_IS
        tensors = formed.make(memory)
        held = store.put(tensors) if store is not None else _holding(tensors)
        # The storage's name stays its own as long as somebody knows of it.
        self._results[key] = weak_storage(t), Stored(held, formed.rebuild, self._read)
        return self._results[key][1]

    def _passing(self) -> set[int]:
        """The storages of what only passes. Asked for once the block runs: before, its parameters may not be gathered."""
        if self._passes is None:
            given = [t for t in self._shared if isinstance(t, Tensor)]
            self._passes = {storage_key(t) for t in (*self._block.parameters(), *given)}
        return self._passes


def _holding(tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    return lambda: tensors


class Keeper:
    """Keeps the results of the blocks of a rank. `form_of(layer, first, x)`: the form for a forward of a block that is given x
    (B, S, D), of sequences from number `first` on; None: as they are. `ranges`: what forms learn of the numbers; None:
    nothing. `told`: what is to be said of it. (No dataclass: FSDP2 copies those that a block is given, and attention has this.)"""

    def __init__(
        self,
        form_of: Callable[[str, int, Tensor], Form] | None = None,
        store: Store | None = None,
        ranges: RunningRanges | None = None,
        told: str | None = None,
    ):
        self.form_of, self.store, self.ranges, self.told = form_of, store, ranges, told
        self.first, self.read = 0, Read()
        self.scope: Scope | None = None

    def around(self, layer: str, block: nn.Module) -> None:
        """Has the forwards of a block, number `layer` of the model, kept here."""
        inner = block.forward

        def forward(x: Tensor, *shared: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return inner(x, *shared)
            with self._running(layer, block, x, shared) as scope:
                # Autograd holds on to its hooks as long as to what they give it, and a scope knows all of its block.
                pack = partial(_pack, weakref.ref(scope))
                with saved_tensors_hooks(pack, Kept.read):
                    return inner(x, *shared)

        block.forward = forward  # inside of what gathers its parameters

    @contextmanager
    def _running(self, layer: str, block: nn.Module, x: Tensor, shared: Sequence[Any]) -> Iterator[Scope]:
        form = None if self.form_of is None else self.form_of(layer, self.first, x)
        if self.store is not None:
            self.store.begin_block()
        self.scope = scope = Scope(form, self.store, self.read, block, shared)
        try:
            yield scope
        finally:
            self.scope = None


def _pack(scope: "weakref.ref[Scope]", t: Tensor) -> Kept:
    running = scope()
    assert running is not None
    return running.pack(t)


def attach(keeper: Keeper, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
    """Has the results of these blocks of `model` kept by `keeper`."""
    setattr(model, _HANDLE, keeper)
    for layer, block in blocks:
        keeper.around(layer, block)


def keeper_of(model: nn.Module) -> Keeper | None:
    """Returns the keeper of what the blocks of `model` make; None: all of it stays as it is."""
    return getattr(model, _HANDLE, None)


def sequences_of_forward() -> int | None:
    """Returns the number of the first sequence of the forward under way, or that is made again; None where it has no backward."""
    return _FIRST.get()


def begin_without_backward() -> None:
    """Says that the coming forwards have no backward."""
    _FIRST.set(None)


def begin_sequences(model: nn.Module, first: int) -> None:
    """Says which sequences the coming forward of `model` has: those from number `first` on, in the order of the data."""
    _FIRST.set(first if torch.is_grad_enabled() else None)
    if (keeper := keeper_of(model)) is not None:
        keeper.first = first
        if keeper.store is not None:
            keeper.store.begin_forward()


@contextmanager
def open_stores(model: nn.Module) -> Iterator[None]:
    """Lets what the blocks of `model` keep be stored, while entered; then what works for its stores ends."""
    try:
        yield
    finally:
        for module in model.modules():
            if (keeper := keeper_of(module)) is not None and keeper.store is not None:
                keeper.store.close()
