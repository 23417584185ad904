"""Keeps some results of a layer between forward and backward, and makes the others again when the backward asks for them.

A forward of the layer makes its results by name (`parallel.activations.results`). What autograd would save passes by here: a
tensor of a result that is not kept gets a stand-in, and the first use of one in the backward makes the result again, and what
that is made of as far as it is gone too, without gradients and with the parameters as they are gathered then. What the
backward makes again it makes once, and holds until its last use. Tensors that are no results stay: parameters, tables, the
log-sum-exp of attention and the reciprocal of a norm's root mean square, and whatever messages have brought.

Nothing is drawn from a generator in a layer, so numbers made again are those of the forward to the last bit. No messages are
sent: attention whose ranks share a sequence is kept. Under ZeRO-3 the parameters are those that were gathered for the backward.
A layer that makes nothing by name is recomputed whole, by `torch.utils.checkpoint`.
"""

import weakref
from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rowwise.kernels.torch_storage import StorageWeakRef, require_unwritten, storage_key, weak_storage, written
from rowwise.parallel.activations.results import Make, plainly
from rowwise.parallel.activations.saved import Keeper, Kept, Scope
from rowwise.parallel.defer import in_recomputation, is_deferred

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Keeping:
    """What a layer keeps, for its `making`: its input and the results named in `kept`, with `keeper` (None: as they are).
    `compiled`: of these names each is made by a compiled function. `leaves`: beside its input, the results that `keeper` is to
    store away from the device, where it has a store; None: all."""

    kept: frozenset[str]
    keeper: Keeper | None = None
    compiled: frozenset[str] = frozenset()
    leaves: frozenset[str] | None = None
    _functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Make:
        return Making(self, x) if torch.is_grad_enabled() else self._plainly

    def function(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Gives what makes the result `name`: `function`, or what it is compiled to."""
        if name not in self.compiled:
            return function
        if name not in self._functions:
            self._functions[name] = torch.compile(function)
        return self._functions[name]

    def _plainly(self, name: str, function: Callable[..., Any], *given: Any) -> Any:
        return plainly(name, self.function(name, function), *given)


class Making:
    """One forward of a layer: makes its results, and knows those that autograd is not to keep as they are. It must end with the
    forward, for it holds them."""

    def __init__(self, keeping: Keeping, x: Tensor):
        self._keeping = keeping
        self._stays: dict[int, tuple[StorageWeakRef, bool]] = {}  # of results, whether they stay on the device
        self._place([x], stays=False)
        # By the id of its storage, since autograd saves views; the storage is held, so that the id stays its own.
        self._known: dict[int, tuple[torch.UntypedStorage, Made, int]] = {}
        self._fresh: list[Saved] = []
        # Autograd holds on to its hooks as long as to what they gave it.
        self._hook = partial(_pack, weakref.ref(self))
        self._scope = None if keeping.keeper is None else keeping.keeper.scope

    def __call__(self, name: str, function: Callable[..., Any], *given: Any) -> Any:
        function = self._keeping.function(name, function)
        self._fresh = []
        taken = [(value, written(value)) for value in given if isinstance(value, Tensor)]
        with saved_tensors_hooks(self._hook, Saved.tensor):
            result = function(*given)
        for value, times in taken:  # it would be another when it is made again
            require_unwritten(value, times)
        tensors = (result,) if isinstance(result, Tensor) else tuple(result)
        stays = self._keeping.leaves is not None and name not in self._keeping.leaves
        self._place(tensors, stays)
        if name not in self._keeping.kept:
            again = partial(
                copy_context().run, make_again, function, tuple(self._referred(value, stays) for value in given)
            )
            self._drop(tensors, Made(again))
        for saved in self._fresh:
            self._settle(saved, stays)
        return result

    def _place(self, tensors: Iterable[Tensor], stays: bool) -> None:
        """Says of the tensors of a result whether they stay on the device."""
        self._stays |= {storage_key(t): (weak_storage(t), stays) for t in tensors}

    def _settle(self, saved: "Saved", stays: bool) -> None:
        """Keeps it where its result is to be; `stays`: that of which it is, if it is of none that is known."""
        if saved.held is not None:
            _, stays = self._stays.get(storage_key(saved.held), (None, stays))
            saved.stay(self._scope, leaves=not stays)

    def _drop(self, tensors: Tensors, made: "Made") -> None:
        for index, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage, made, index
        # What was saved while it was made, before anyone knew of it: attention saves its own output.
        for saved in self._fresh:
            self._refer(saved)

    def pack(self, tensor: Tensor) -> "Saved":
        """Gives what autograd is to have in the place of a tensor."""
        saved = self._refer(Saved(tensor))
        self._fresh.append(saved)
        return saved

    def _referred(self, value: Any, stays: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        saved = self._refer(Saved(value))
        self._settle(saved, stays)
        return saved

    def _refer(self, saved: "Saved") -> "Saved":
        if saved.held is not None and (known := self._known.get(id(saved.held.untyped_storage()))):
            saved.refer(*known[1:])
        return saved


def _pack(making: "weakref.ref[Making]", tensor: Tensor) -> "Saved":
    this = making()
    assert this is not None
    return this.pack(tensor)


class Made:
    """A result that is made again when it is first asked for."""

    __slots__ = ("_again", "_tensors")

    def __init__(self, again: Callable[[], Tensors]):
        self._again: Callable[[], Tensors] | None = again
        self._tensors: Tensors | None = None

    def tensors(self) -> Tensors:
        if self._tensors is None:
            assert self._again is not None
            self._tensors = self._again()
            self._again = None  # and with it what only this was made of
        return self._tensors


class Saved:
    """What autograd has in the place of a tensor that it saved: `held`, the tensor itself, where it lies in a result, or what
    keeps it in another form."""

    __slots__ = ("_kept", "_learns", "_made", "_place", "_written", "held")

    def __init__(self, tensor: Tensor):
        self.held: Tensor | None = tensor.detach()  # an output that held itself would never be freed
        self._learns, self._written = tensor.requires_grad, written(tensor)
        self._made: Made | None = None
        self._kept: Kept | None = None

    def refer(self, made: Made, index: int) -> None:
        """Lets `made` give it from now on, of which it is a view of tensor `index`."""
        assert self.held is not None
        self._place = index, self.held.size(), self.held.stride(), self.held.storage_offset()
        self._made, self.held = made, None

    def stay(self, scope: Scope | None, leaves: bool) -> None:
        """Keeps it in the form that the run asks for, if it is not to be made again; where it `leaves`, off the device."""
        if scope is not None and self.held is not None:
            self._kept, self.held = scope.keep(self.held, self._learns, leaves), None

    def tensor(self) -> Tensor:
        if self.held is not None:
            return require_unwritten(self.held, self._written)
        if self._kept is not None:
            return self._kept.read()
        assert self._made is not None
        index, size, stride, offset = self._place
        return self._made.tensors()[index].as_strided(size, stride, offset)


@torch.no_grad()
def make_again(function: Callable[..., Any], given: tuple[Any, ...]) -> Tensors:
    """Makes a result as the forward made it, of what that was given."""
    result = function(*(value.tensor() if isinstance(value, Saved) else value for value in given))
    return (result,) if isinstance(result, Tensor) else tuple(result)


def recompute_whole(layer: nn.Module) -> None:
    """Makes a layer that makes nothing by name keep its input alone, and run again in the backward; in place."""
    forward = layer.forward

    def forward_again(*given: Any) -> Any:
        run = partial(copy_context().run, forward)
        if is_deferred():
            return checkpoint(run, *given, use_reentrant=False, context_fn=in_recomputation)
        return checkpoint(run, *given, use_reentrant=False)

    layer.forward = forward_again
