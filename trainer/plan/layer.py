"""What a layer holds in its backward, from moment to moment: gradients of its results, what is made again or decoded, and what of
it is still kept.

A layer tells the pieces of its backward, in their order (`Layer.work`): which of its results each needs, and how many bytes a token
of gradients and temporaries are there during it and after it. A result that is not kept is made again, with all that it is made of,
when it is first needed, and one that is kept as codes is decoded; both are held until they are needed no more
(`parallel.activations.recompute`, `parallel.activations.saved`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rowwise.parallel.activations.results import INPUT, LayerResults, LayerWork, Result


@dataclass(frozen=True)
class Kept:
    """What a layer keeps beside its input: the results `names`, in numbers of `width` bytes or `coded`."""

    names: frozenset[str]
    width: int
    coded: bool = False


@dataclass(frozen=True)
class Moment:
    """Of a layer's backward, bytes a token: of what was kept `released` are gone, `working` are there beside what is left of it, and
    `deferred` wait for the weights' gradients, beside what was kept that these need. `parameters`: as in `BackwardPiece`. Of what
    was away, of which nothing stays once it was read: `read` is read now, and `unread` later. `decoding`: what is there of `working`
    while codes are decoded, 0 where none are; `given`: what is there of it when it begins, while parameters get their gradients, with
    what was made again for the moment before, of which `gone` bytes are let go of once that is over."""

    released: int
    working: int
    deferred: int
    parameters: int
    read: int = 0
    unread: int = 0
    decoding: int = 0
    given: int = 0
    gone: int = 0


ALL = 1 << 30  # parameters: more than a layer has


def weight_gradients(backward: Sequence[Moment]) -> Iterator[tuple[int, int]]:
    """Gives, for each moment, how many parameters have their gradients then where these come later, and how much of what waited for
    them they have used: what was there before the first of the parameters of that moment."""
    for n, moment in enumerate(backward):
        used = (before.deferred for before in backward[:n] if before.parameters < moment.parameters)
        yield moment.parameters, max(used, default=0)


def moments(table: LayerResults, kept: Kept, work: LayerWork, split: bool) -> tuple[Moment, ...]:
    """Walks through a layer's backward; the last moment is its end. `split`: weights' gradients come later."""
    known, width = results_by_name(table), kept.width
    read = reads(table, kept, work)
    waiting = waits(table, work) if split else frozenset[str]()
    opened = {name: whole(known[name], kept) for name in read if kept.coded or name not in stored(kept)}
    again = {name for name in opened if name not in stored(kept)}
    # Codes are needed no more once they are decoded, and what is as it was when its last reader has it.
    back = {name: (known[name].bytes_waiting(name in stored(kept), width, kept.coded), read[name]) for name in read}
    released, outputs, found, before = 0, 0, list[Moment](), table.input * width
    remade, gone = 0, 0  # of the piece before
    for n, piece in enumerate(work.backward):
        outputs += piece.outputs if split else 0
        deferred = outputs + sum(opened[name] for name in again & waiting if read[name][0] <= n)
        held = sum(opened[name] for name in opened.keys() - (again & waiting) if read[name][0] <= n <= read[name][-1])
        unread = sum(size for size, at in back.values() if at[0] > n)
        there = sum(size for size, at in back.values() if at[0] <= n <= (at[0] if kept.coded else at[-1]))
        beside = piece.beside if split else piece.during
        # What others alone were made of again goes before the piece begins.
        made_of = [
            name for name, at in read.items() if name in opened and at[-1] == n and name not in {*piece.needs, *waiting}
        ]
        left = held - sum(opened[name] for name in made_of)
        # Of gradients there are then those that the piece before has left to this one.
        given = min(before, beside)
        decoding = (held + given) * (kept.coded and any(at[0] == n for _, at in back.values()))
        working, given = max(held + given, left + beside), given + remade
        found.append(Moment(released, working, deferred, piece.parameters, there, unread, decoding, given, gone))
        before = beside
        made = [name for name in again - waiting - {*made_of} if read[name][0] <= n <= read[name][-1]]
        remade, gone = (sum(opened[name] for name in names) for names in (made, [m for m in made if read[m][-1] == n]))
        for name in (name for name, at in read.items() if at[-1] == n):
            released += known[name].bytes_waiting(name in stored(kept) - waiting, width, kept.coded)
    deferred = outputs + sum(opened.get(name, 0) for name in waiting - stored(kept))
    gone = table.bytes_kept(kept.names, width, kept.coded) - later(table, kept, waiting)
    return (*found, Moment(gone, table.input * width, deferred, ALL, given=table.input * width))


def results_by_name(table: LayerResults) -> dict[str, Result]:
    """Gives the results of a layer, its input among them, by name."""
    return {INPUT: Result(INPUT, table.input, 0), **{result.name: result for result in table.results}}


def stored(kept: Kept) -> frozenset[str]:
    """Names what a layer keeps, its input among it."""
    return kept.names | {INPUT}


def waits(table: LayerResults, work: LayerWork) -> frozenset[str]:
    """Names the results that weights' gradients need."""
    return frozenset(name for piece in work.backward for name in piece.inputs) & (table.names | {INPUT})


def later(table: LayerResults, kept: Kept, waiting: frozenset[str]) -> int:
    """Counts the bytes a token of what is kept that stays for weights' gradients."""
    known = results_by_name(table)
    return sum(known[name].bytes(known[name].numbers, kept.width, kept.coded) for name in waiting & stored(kept))


def whole(result: Result, kept: Kept) -> int:
    """Counts the bytes a token of a result as an operator reads it, made again or decoded."""
    return (result.numbers + result.fixed * kept.coded) * kept.width


def reads(table: LayerResults, kept: Kept, work: LayerWork) -> Mapping[str, list[int]]:
    """Finds in which pieces of the backward each result is read: by an operator, or to make another again, which is done once."""
    known, found = results_by_name(table), dict[str, list[int]]()

    def read(name: str, piece: int) -> None:
        made = name in found
        found.setdefault(name, []).append(piece)
        if name not in stored(kept) and not made:
            for given in known[name].of:
                read(given, piece)

    for n, piece in enumerate(work.backward):
        for name in piece.needs:
            if name in known:
                read(name, n)
    return found
