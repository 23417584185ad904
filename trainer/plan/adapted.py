"""What is otherwise of a layer some of whose matrices do not learn, or have an adapter beside them.

    a result        is kept where something is left that reads it: no weight's gradient needs what goes into a weight without one
    its backward    ends with the first of its parameters that learns, where nothing before the layer does
    its linears     hold what they are found to (`plan.linears`), on their way and from forward to backward

Pieces of its backward name the linear layers that they go through (`BackwardPiece.linears`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rowwise.kernels.spec import Specs
from rowwise.parallel.activations.results import INPUT, BackwardPiece, LayerResults, LayerWork, Result
from rowwise.parallel.precision import compute_dtype
from rowwise.trainer.activations import one_by_one, tokens_of
from rowwise.trainer.adapters.config import NoAdapter
from rowwise.trainer.adapters.specs import adapted_layers, is_added
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.layer import ALL, Kept, Moment, reads, results_by_name, stored
from rowwise.trainer.plan.linears import Given, Held, LinearForm, held_by
from rowwise.trainer.plan.weights import arrivals


@dataclass(frozen=True)
class LayerForm:
    """What a layer's matrices are. `linears`: the linear layers of each piece of its backward; `first`: the piece in which the
    first of its parameters that learns has its gradient, where nothing before the layer learns (None: something does); -1: none
    of them learns either."""

    linears: tuple[tuple[LinearForm, ...], ...]
    first: int | None

    @property
    def is_plain(self) -> bool:
        """Says whether the layer is as its block says."""
        return self.first is None and all(form.is_plain for forms in self.linears for form in forms)


@dataclass(frozen=True)
class Extra:
    """Bytes of a piece of a backward, or of the forward, beside what its block says: `kept` for it by the forward, `working` on its
    way, and where weights' gradients come later `rest` of what is kept and `later` of what is made."""

    kept: int = 0
    working: int = 0
    rest: int = 0
    later: int = 0


@dataclass(frozen=True)
class Adapted:
    """A layer as it is: its results, its work, and what there is beside each piece of its backward. `most`: bytes at most in its
    forward, with the results that there are then, where products and attention take more than its work knows (0: they do not)."""

    table: LayerResults
    work: LayerWork
    extras: tuple[Extra, ...]
    most: int = 0


def form_of(config: TrainConfig, piece: Specs, work: LayerWork, begins: bool) -> LayerForm:
    """Reads what the matrices of a layer are, whose parameters are a piece. `begins`: nothing before it learns."""
    adapter, adapted = config.adapter, set(adapted_layers(piece, config.adapter))
    modules = {path_in_layer(name): (name, spec) for name, spec in piece.items() if spec.role == "hidden"}

    def linear(path: str) -> LinearForm:
        name, spec = modules[path]
        layer, (rows, columns) = module_of(name), spec.shape
        bias = any(module_of(one) == layer and one != name and not is_added(one) for one in piece)
        rank = 0 if isinstance(adapter, NoAdapter) or layer not in adapted else adapter.at(name).rank
        return LinearForm(rows, columns, bias, not spec.frozen, spec.kept, rank)

    linears = tuple(tuple(map(linear, one.linears)) for one in work.backward)
    return LayerForm(linears, first_learning(piece, work) if begins else None)


def module_of(name: str) -> str:
    """Names the module of a parameter."""
    return name.rpartition(".")[0]


def path_in_layer(name: str) -> str:
    """Names the module of a layer's parameter, by its path in the layer."""
    return module_of(name).split(".", 2)[2]


def first_learning(mine: Specs, work: LayerWork) -> int:
    """Finds the last piece of a layer's backward that leaves a gradient; -1: none does."""
    found = arrivals([*mine], {name for name, spec in mine.items() if spec.frozen})
    counts = [*(piece.parameters for piece in work.backward), ALL]
    learns = [any(found[before:after]) for before, after in itertools.pairwise(counts)]
    return max((n for n, one in enumerate(learns) if one), default=-1)


def adapt(
    config: TrainConfig, form: LayerForm, table: LayerResults, work: LayerWork, kept: Kept, split: bool, gpu: bool
) -> Adapted:
    """Tells what a layer of this form makes and holds, by what one does whose parameters learn."""
    if form.is_plain:
        return Adapted(table, work, tuple(Extra() for _ in work.backward))
    pieces = work.backward if form.first is None else work.backward[: form.first + 1]
    given_to = [piece.needs for piece in pieces]
    needed = [name for piece in pieces for name in piece.needs]
    held = [
        _held(config, form.linears[n], _given(config, piece, kept, n != form.first, needed), split, gpu)
        for n, piece in enumerate(pieces)
    ]
    pieces = tuple(_piece(piece, one) for piece, one in zip(pieces, held, strict=True))
    extras = tuple(Extra() if one is None else _extra(*one) for one in held)
    first, work = form.first, replace(work, backward=pieces)
    read, tokens = frozenset(reads(table, kept, work)), tokens_of(config)
    if first is not None and kept.coded:
        size = _uncoded(table, read, given_to[first], bool(form.linears[first]), kept) * tokens
        extras = (*extras[:first], replace(extras[first], kept=extras[first].kept + size), *extras[first + 1 :])
    most = [
        _there(table, read, given[0], kept) * tokens + max(one[0].forward, 2 * forms[0].rows * kept.width * tokens)
        for one, forms, given in zip(held, form.linears, given_to, strict=False)
        if one is not None
    ]
    return Adapted(_left(table, read, table.names - kept.names), work, extras, max(most, default=0))


def _there(table: LayerResults, read: frozenset[str], given: str, kept: Kept) -> int:
    """Counts the bytes a token of what is there when a layer computes with the result `given`: it, and those before it that are read
    in the backward, made again or taken by those after it; of what becomes codes these alone, once all that takes it is there."""
    names = [INPUT, *(result.name for result in table.results)]
    before, after = table.results[: names.index(given)], table.results[names.index(given) :]
    taken = {given, *(name for result in after for name in result.of)}
    again = table.names - kept.names
    whole = _left(LayerResults(table.input, before), (read - stored(kept) if kept.coded else read) | taken, again)
    codes = _left(table, read).bytes_kept(kept.names, kept.width, True) if kept.coded else 0
    return whole.bytes_kept(table.names, kept.width) + codes


def _uncoded(table: LayerResults, read: frozenset[str], given: tuple[str, ...], linears: bool, kept: Kept) -> int:
    """Counts the bytes a token that what is kept takes more than its codes would where it has no gradient, and stays as it is: what
    goes into the first piece that leaves any, but for that itself where `linears` have it."""
    known = results_by_name(table)
    names = [*known]
    before = names[: max((names.index(name) for name in given), default=-1) + 1]
    plain = [known[name] for name in before if name in read & stored(kept) and not (linears and name in given)]
    return sum(one.bytes(one.numbers, kept.width, False) - one.bytes(one.numbers, kept.width, True) for one in plain)


def _given(config: TrainConfig, piece: BackwardPiece, kept: Kept, learns: bool, needed: Sequence[str]) -> Given:
    """What the linear layers of a piece are given. `needed`: by all pieces of the backward."""
    sequences = config.batch.micro_size
    coded, stays = config.memory.compress != "none", any(needed.count(name) > 1 for name in piece.needs)
    again = coded and not stored(kept).issuperset(piece.needs)
    dtype = compute_dtype(config.precision)
    return Given(
        sequences, tokens_of(config) // sequences, dtype, learns, stays, coded, coded and one_by_one(config), again
    )


def _held(
    config: TrainConfig, forms: tuple[LinearForm, ...], given: Given, split: bool, gpu: bool
) -> tuple[Held, Held] | None:
    """What linears hold, and what they would if they had nothing beside weights that do not learn; None: there are none."""
    if not forms:
        return None
    bare = tuple(replace(form, learns=False, kept=None, rank=0) for form in forms)
    return held_by(forms, config.adapter, given, split, gpu), held_by(
        bare, config.adapter, replace(given, learns=True, stays=True)
    )


def _piece(piece: BackwardPiece, held: tuple[Held, Held] | None) -> BackwardPiece:
    """A piece of the backward of a layer whose matrices do not learn by themselves: no gradient waits for theirs."""
    piece = replace(piece, outputs=0, beside=piece.during)
    if held is None:
        return piece
    one, _ = held
    return replace(piece, needs=piece.needs if one.needs_input else (), inputs=piece.inputs if one.input_waits else ())


def _extra(one: Held, bare: Held) -> Extra:
    return Extra(one.kept, one.backward - one.later - bare.backward, one.rest, one.later)


def _left(table: LayerResults, names: frozenset[str], again: frozenset[str] = frozenset()) -> LayerResults:
    """The results of which these are left. `again`: those that would be made again are there until the forward is over, whether
    anything reads them or not."""

    def as_left(result: Result) -> Result:
        if result.name in names:
            return result
        return replace(result, numbers=result.numbers if result.name in again else 0, fixed=0)

    return LayerResults(table.input if INPUT in names else 0, tuple(map(as_left, table.results)))


def with_extras(backward: Sequence[Moment], extras: Sequence[Extra]) -> tuple[Moment, ...]:
    """Adds to the moments of a layer's backward, in bytes of a micro-batch, what there is beside them."""
    found = []
    for n, moment in enumerate(backward):
        now = extras[n] if n < len(extras) else Extra()
        before, after = extras[:n], extras[n + 1 :]
        found.append(
            replace(
                moment,
                released=moment.released + sum(one.kept - one.rest for one in before),
                working=max(0, moment.working + now.working),
                deferred=moment.deferred + sum(one.later for one in (*before, now)),
                read=moment.read + now.kept,
                unread=moment.unread + sum(one.kept for one in after),
            )
        )
    return tuple(found)
