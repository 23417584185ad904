"""What linear layers hold whose weights do not learn, or have an adapter beside them: found by computing with them on the meta device,
where nothing takes memory.

Layers of one input are computed together, as a layer of a decoder has them: queries, keys and values, say.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rowwise.kernels.activation_codes import Groups, code_bytes
from rowwise.kernels.coded_rows import RowForm
from rowwise.kernels.torch_dispatch import Births
from rowwise.kernels.torch_storage import storage_key
from rowwise.parallel.activations.compress import Coding, Tokens
from rowwise.parallel.activations.saved import Formed, Keeper, begin_sequences
from rowwise.parallel.defer import WeightGradients, deferred
from rowwise.trainer.adapters.config import AdapterConfig, LoraBase, NoAdapter
from rowwise.trainer.adapters.convert import LAYERS
from rowwise.trainer.adapters.dropout import PORTION, Dropout
from rowwise.trainer.adapters.frozen import FrozenLinear
from rowwise.trainer.adapters.lora import LoraLinear
from rowwise.trainer.plan.codes import coding_bytes

META = torch.device("meta")
_known: dict[Any, "Held"] = {}  # of what was computed with


@dataclass(frozen=True)
class LinearForm:
    """A linear layer: its weight (rows, columns), which `learns` or is `kept` as codes or in another dtype (None: in that of
    computation), whether it has a `bias`, and the `rank` of the run's adapter beside it (0: it has none)."""

    rows: int
    columns: int
    bias: bool
    learns: bool
    kept: RowForm | torch.dtype | None
    rank: int

    @property
    def is_plain(self) -> bool:
        """Says whether it learns by itself."""
        return self.learns and not self.rank


@dataclass(frozen=True)
class Given:
    """What linear layers are given: (sequences, tokens, columns) in `dtype`; whether it `learns`, so that it has a gradient, and
    whether it `stays` while they are gone through, for others that need it. `coded`: what they keep becomes 8-bit codes, at once, or
    where they are made `apart` once all that they give is there; but for what they are given, if that is made `again`."""

    sequences: int
    tokens: int
    dtype: torch.dtype
    learns: bool
    stays: bool
    coded: bool = False
    apart: bool = False
    again: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes of linear layers beside their input and its codes, its gradients and those of parameters. `kept`: from the forward to the
    backward, with the input where they need it (`needs_input`); `forward`: at most beside that, with what they give; `backward`: at
    most beside that and the gradients of what they give, of which some is let go of meanwhile. Where weights' gradients come later,
    `rest` of what was kept waits for them, and `later` of what the backward made, with the input where they need it
    (`input_waits`)."""

    kept: int
    needs_input: bool
    forward: int
    backward: int
    rest: int
    later: int
    input_waits: bool


def held_by(
    forms: tuple[LinearForm, ...], adapter: AdapterConfig, given: Given, split: bool = False, gpu: bool = False
) -> Held:
    """Finds what linear layers of one input hold. `split`: their weights' gradients come later; a `gpu` decodes with nothing beside
    what that gives."""
    asked = forms, repr(adapter), given, split, gpu, torch.get_num_threads()
    if asked not in _known:
        together = _Together([_layer(form, adapter, given, gpu) for form in forms])
        keeper = Keeper(partial(_Sizes, _tokens_of(given), gpu, given.again) if given.coded else None)
        together.keeper = keeper if given.apart else None
        keeper.around("", together)
        plain = replace(given, coded=False, apart=False, again=False)
        as_it_is = held_by(forms, adapter, replace(plain, stays=False), split, gpu) if given.coded else None
        # What it says of sequences is for it alone.
        held = copy_context().run(_compute, together, forms[0].columns, given, split, keeper, as_it_is)
        if given.coded:  # the codes of an input that others need stay
            known = held_by(forms, adapter, plain, split, gpu)
            held = replace(held, needs_input=known.needs_input, input_waits=known.input_waits)
        _known[asked] = held
    return _known[asked]


def _layer(form: LinearForm, adapter: AdapterConfig, given: Given, gpu: bool) -> nn.Linear:
    linear = nn.Linear(form.columns, form.rows, form.bias, device=META, dtype=given.dtype)
    linear.requires_grad_(form.learns)
    if form.rank:
        assert not isinstance(adapter, NoAdapter)
        own = adapter if form.rank == adapter.rank else replace(adapter, rank=form.rank)
        linear = LAYERS[type(adapter)](linear, own)
        if isinstance(linear, LoraLinear) and isinstance(adapter, LoraBase) and adapter.dropout:
            linear.dropout = _TwoPortions(adapter.dropout, 0, _tokens_of(given))
    if form.kept is not None:
        linear = linear if isinstance(linear, FrozenLinear) else FrozenLinear(linear)
        other = torch.bfloat16 if given.dtype != torch.bfloat16 else torch.float16
        linear.keep(other if gpu and isinstance(form.kept, RowForm) else form.kept)
    return linear


class _TwoPortions(Dropout):
    """Dropout of as much as shows what all of it holds: it goes by portions, beside one of which the next is drawn."""

    def apply_(self, x: Tensor, numbers: Tensor) -> Tensor:
        some = slice(2 * max(1, PORTION // x.size(1)))
        super().apply_(x[some], numbers[some])
        return x


def _tokens_of(given: Given) -> Tokens:
    places = torch.arange(given.tokens, device=META)
    return Tokens(given.tokens, places, places)


class _Together(nn.Module):
    """Linear layers of one input."""

    keeper: Keeper | None = None  # of what becomes codes once all that they give is there

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        scope = None if self.keeper is None else self.keeper.scope
        with nullcontext() if scope is None else scope.waits():
            return [layer(x) for layer in self.layers]


class _Sizes(Coding):
    """Codes of which nothing is made but their memory, and beside it as much as it takes to make them."""

    def __init__(self, tokens: Tokens, gpu: bool, again: bool, layer: str, first: int, x: Tensor):
        super().__init__(0, tokens, layer, first, x)
        self._rows, self._gpu = x.size(0) * x.size(1), gpu
        self._stays = storage_key(x) if again else None

    def of(self, t: Tensor, learns: bool) -> Formed | None:
        return None if storage_key(t) == self._stays else super().of(t, learns)

    def _formed(self, parts: Sequence[tuple[str, Groups]], columns: int, dtype: torch.dtype, attention: bool) -> Formed:
        rows = self._rows
        coding, decoding = (0, 0) if self._gpu else coding_bytes(columns, rows)

        def make(memory: Tensor) -> list[Tensor]:
            codes, _ = _bytes(rows * code_bytes(columns, parts[0][1].width)), _bytes(coding)
            return [codes]

        def rebuild(kept: Sequence[Tensor]) -> Tensor:
            numbers, _ = torch.empty(rows * columns, device=META, dtype=dtype), _bytes(decoding)
            return numbers

        return Formed(make, rebuild)


def _bytes(size: int) -> Tensor:
    return torch.empty(size, device=META, dtype=torch.uint8)


def _compute(
    together: _Together, columns: int, given: Given, split: bool, keeper: Keeper, as_it_is: Held | None
) -> Held:
    """Computes with them. `as_it_is`: what they hold, alone with their input, where nothing becomes codes."""
    begin_sequences(nn.Module(), 0)
    shape = given.sequences, given.tokens, columns
    leaf = torch.empty(*shape, device=META, dtype=given.dtype, requires_grad=given.learns)
    together(leaf.clone())  # what is made once for all
    watch, later = _Watch(), WeightGradients(keeper.read.hold)
    for p in (p for p in together.parameters() if p.requires_grad):
        p.register_post_accumulate_grad_hook(watch.leave_out)
    with watch, deferred(later) if split else nullcontext():
        x = leaf.clone()
        made = together(x)
    storage, size = weakref.ref(x.untyped_storage()), x.nbytes
    codes = given.coded and not given.again  # of the input
    stays = x.detach() if given.stays and not codes else None
    del x
    outputs, needs = sum(y.nbytes for y in made), storage() is not None if as_it_is is None else as_it_is.needs_input
    waiting = given.sequences * given.tokens * code_bytes(columns) if codes else size
    kept = watch.now - outputs - waiting * needs
    forward = watch.most - kept - size
    returning = [y for y in made if y.requires_grad]
    gradients = [torch.empty_like(y) for y in returning]
    watch.begin_backward()
    with watch:
        torch.autograd.backward(returning, gradients)
    decoded = size if codes else 0
    backward = watch.most - outputs - kept - (waiting + decoded) * needs
    leaf.grad = None
    del made, returning, stays
    rest, new = watch.left()
    waits = storage() is not None if as_it_is is None else as_it_is.input_waits
    return Held(kept, needs, forward, backward, rest - waiting * waits, new, waits)


class _Watch(Births[tuple[int, bool]]):
    """While entered, counts the bytes of the storages that operations make, `now` and at `most`; notes of each its bytes and whether
    the backward made it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._returning = False

    def begin_backward(self) -> None:
        """Says that what is made from now on is the backward's."""
        self._returning, self.most = True, self.now

    def leave_out(self, p: Tensor) -> None:
        """Counts the gradient of a parameter no longer."""
        if p.grad is not None:
            self.note_death(id(p.grad.untyped_storage()))

    def left(self) -> tuple[int, int]:
        """Counts what is there of the forward's, and of the backward's."""
        there = [noted for _, noted in self.there.values()]
        return sum(s for s, returning in there if not returning), sum(s for s, returning in there if returning)

    def begun(self, size: int, operation: str) -> tuple[int, bool]:
        self.now += size
        self.most = max(self.most, self.now)
        return size, self._returning

    def ended(self, noted: tuple[int, bool]) -> None:
        self.now -= noted[0]
