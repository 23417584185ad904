"""What a step holds of parameters that FSDP2 splits, beside a rank's rows (`parallel.shard`).

With a group's numbers P made up to whole rows on each of N ranks, and c, r, k the bytes of a number as it computes, as ranks sum it
and as it is kept:

    gather      a buffer P c and, where c != k, one of P c / N; then the group's parameters, P c. In a forward the buffer stays
                until the next group's are there; in a backward the next group's is there already.
    reduce      the gradients, whole, and a buffer P r, which stays until the next group's turn; then P k / N, and where r != k
                P r / N before that.
"""

from collections.abc import Sequence

from rowwise.parallel.row_file import BLOCK
from rowwise.trainer.plan.beside import Ways
from rowwise.trainer.plan.ledger import FILE, HOST, Ledger
from rowwise.trainer.plan.states import Group, Widths
from rowwise.trainer.plan.update import NONE, Updates
from rowwise.trainer.plan.weights import arrivals

PLAIN = Ways()
WIDE = 4  # bytes of a number that has 32 bits


class Sharded:
    """What FSDP2 does on one of `shards` ranks with other rows, of which there are `replicas` sets. `zero` below 3 keeps parameters
    from the first forward of a step to its last backward. `sums`: a pipeline adds gradients up, whole, and has them reduced.
    `ways`: how rows come and go; `updates`: of the optimizer's step of each parameter, where it is made in the backward, and frees its
    gradient."""

    def __init__(
        self,
        ledger: Ledger,
        groups: Sequence[Group],
        widths: Widths,
        zero: int,
        ranks: tuple[int, int],
        ways: Ways = PLAIN,
        sums: bool = False,
        updates: Updates | None = None,
    ):
        self._ledger, self._groups, self._widths, self._zero = ledger, groups, widths, zero
        (self._shards, self._replicas), self._sums, self._updates, self._ways = ranks, sums, updates, ways
        self._order = sorted(range(len(groups)), key=lambda g: (groups[g].pieces[1], groups[g].root))
        self._place = {g: place for place, g in enumerate(self._order)}
        self._begin: dict[int, list[int]] = {}  # piece -> the groups that begin with it
        self._end_with: dict[int, list[int]] = {}
        # piece -> of its parameters, counted from the last, the group, name and numbers of what then has a gradient
        self._tensors: dict[int, list[list[tuple[int, str, int]]]] = {}
        for g, group in enumerate(groups):
            self._begin.setdefault(group.pieces[0], []).append(g)
            self._end_with.setdefault(group.pieces[1], []).append(g)
            for piece in dict.fromkeys(piece for piece, *_ in group.tensors):
                numbers = {name: count for at, name, count in group.tensors if at == piece}
                found = [[(g, name, numbers[name]) for name in names] for names in arrivals([*numbers], group.frozen)]
                self._tensors[piece] = found + self._tensors.get(piece, [])
        # A pipeline adds up in 32 bits whatever ranks sum in.
        self._sum_width = max(WIDE, widths.reduce) if sums else widths.reduce
        self._last, self._forwards = True, 0
        self._keeps: bool | None = None  # None: as each group says
        self._here, self._coming, self._split = set[int](), set[int](), set[int]()
        self._copied = set[int]()  # the groups that neighbours keep copies of
        self._buffer: int | None = None  # the group that was gathered last in a forward
        self._reducing: int | None = None
        self._whole: dict[int, dict[str, int]] = {}  # group -> its gradients as a backward leaves them, by tensor
        self._wide: dict[int, dict[str, int]] = {}  # as they are added up
        self._done: dict[int, set[str]] = {}  # piece -> whose gradients of the backward under way are there
        self._partial: dict[int, int] = {}  # bytes that replicas have not added up yet
        self._leaving = 0  # bytes of gradients that a file is given
        self._waiting = 0  # bytes that replicas have added up and that stay until the backward ends

    def begin(self, last: bool) -> None:
        self._last = last
        self._forwards += 1

    def enter(self, piece: int) -> None:
        for g in self._begin.get(piece, ()):
            if g not in self._here:
                self._fetch(g)
                self._arrive(g)
                self.end_forward()
                self._buffer = g if self._shards > 1 else None

    def leave(self, piece: int) -> None:
        for g in self._end_with.get(piece, ()):
            if not (self._groups[g].kept if self._keeps is None else self._keeps):
                self._free(g)

    def end_forward(self) -> None:
        if self._buffer is not None:
            self._ledger.give("messages", self._gathered(self._buffer))
            self._buffer = None

    def enter_back(self, piece: int) -> None:
        for g in sorted(self._end_with.get(piece, ()), key=self._place.__getitem__, reverse=True):
            place = self._place[g]
            if g not in self._here:
                self._fetch(g)
                self._arrive(g)
                if self._shards > 1:
                    self._ledger.give("messages", self._gathered(g))
            if self._sums:
                before = self._order[max(0, place - 1)]
            elif place or self._forwards > 1:  # before the first group comes the last one, of the micro-batch before
                before = self._order[place - 1]
            else:
                continue
            self._fetch(before)

    def holds(self, piece: int) -> bool:
        every = (entry for together in self._tensors.get(piece, ()) for entry in together)
        return any(name in self._whole.get(g, {}) for g, name, _ in every)

    def add_gradients(self, piece: int, count: int, gone: int = 0) -> None:
        width, done = self._widths.compute, self._done.setdefault(piece, set())
        some = self._tensors.get(piece, [])[:count]
        for g, name, numbers in (entry for together in some for entry in together):
            if name in done:
                continue
            done.add(name)
            whole = self._whole.setdefault(g, {})
            if name in whole:  # added to what is there
                self._ledger.use("working", numbers * width)
            else:
                self._ledger.take("gradients", numbers * width)
                whole[name] = numbers

    def leave_back(self, piece: int) -> None:
        self._done.clear()
        for g in self._begin.get(piece, ()):
            if not self._groups[g].late:
                self._end(g)

    def end_backward(self) -> None:
        for g in sorted(range(len(self._groups)), key=lambda g: not self._groups[g].root):
            if self._groups[g].late:
                self._end(g)
        if self._last and not self._sums:
            self.close()

    def keep(self, keeps: bool) -> None:
        self._keeps = keeps

    def reduce(self) -> None:
        self._last = True
        for g in sorted(range(len(self._groups)), key=lambda g: (self._groups[g].root, -g)):
            self._narrow(g)
            self._end(g, reduces=True)

    def add_up(self) -> None:
        self._done.clear()  # weights' gradients may come several times in a row
        for g in range(len(self._groups)) if self._widths.compute < WIDE else ():
            self._widen(g)

    def close(self) -> None:
        self._drop_buffer()
        for g in self._coming:
            self._ledger.give("messages", self._gathered(g))
        self._coming.clear()
        self._ledger.give("messages", self._waiting + sum(map(self._copy, self._copied)))
        self._copied.clear()
        self._forwards = self._waiting = 0

    def _fetch(self, g: int) -> None:
        """Starts to gather a group, unless it is there or on its way."""
        if self._shards == 1 or g in self._here or g in self._coming:
            return
        group, width = self._groups[g], self._widths.compute
        cast = (group.shard - group.as_kept[0]) * width if self._widths.mixed else 0
        self._ledger.take("messages", cast + self._gathered(g))
        if g not in self._copied:
            self._ledger.use("messages", (1 + self._shards) * self._groups[g].coded)
            self._ledger.take("messages", self._copy(g))
            self._copied |= {g} if self._ways.inner else set()
        self._ledger.give("messages", cast)
        self._coming.add(g)

    def _copy(self, g: int) -> int:
        return self._gathered(g) // self._ways.inner if self._ways.inner else 0

    def _arrive(self, g: int) -> None:
        if self._ways.coded and self._shards == 1:  # a matrix at a time is rounded by itself
            most = max(numbers for *_, numbers in self._groups[g].tensors)
            self._ledger.use("working", most * (self._widths.compute + 1))
        self._ledger.take("gathered", self._gathered(g))
        self._here.add(g)
        self._coming.discard(g)

    def _free(self, g: int) -> None:
        if g in self._here:
            self._here.remove(g)
            self._ledger.give("gathered", self._gathered(g))

    def _end(self, g: int, reduces: bool = False) -> None:
        """After the backward of a group: its gradients are added up or reduced, as the stage of ZeRO says."""
        if self._wide.get(g):
            self._widen(g)
        widths, whole, wide = self._widths, self._whole.get(g, {}), self._wide.get(g, {})
        if not reduces and (self._sums or (self._zero <= 1 and not self._last)):
            if self._zero == 3 and not self._keeps:
                self._free(g)
            if whole and not wide and widths.compute != widths.reduce:
                self._widen(g)
            return
        if self._last or self._zero == 3:
            self._free(g)
        self._drop_buffer()  # also where nothing of the group has a gradient
        if whole or wide:
            self._reduce(g, whole, wide)

    def _widen(self, g: int) -> None:
        """Makes of gradients as the backward leaves them what they are added up in, or adds them to that where it is there."""
        wide = self._wide.setdefault(g, {})
        for name, numbers in self._whole.pop(g, {}).items():
            if name not in wide:
                self._ledger.take("gradients", numbers * self._sum_width)
                wide[name] = numbers
            self._ledger.give("gradients", numbers * self._widths.compute)

    def _narrow(self, g: int) -> None:
        """Makes of what a pipeline has added up what ranks sum."""
        for numbers in self._wide.get(g, {}).values() if self._sum_width != self._widths.reduce else ():
            self._ledger.take("gradients", numbers * self._widths.reduce)
            self._ledger.give("gradients", numbers * self._sum_width)

    def _reduce(self, g: int, whole: dict[str, int], wide: dict[str, int]) -> None:
        """Sums the gradients of a group over ranks: see above."""
        ledger, widths, (_, shard) = self._ledger, self._widths, self._groups[g].reduced
        ledger.take("messages", self._reduced(g))
        self._reducing = g
        held = 0  # by FSDP2, of the last tensor, until the sum is there
        if self._shards > 1:
            last = next(name for _, name, _ in self._groups[g].tensors[::-1] if name not in self._groups[g].frozen)
            held = whole.pop(last, 0) * widths.compute + wide.pop(last, 0) * widths.reduce
        self._give(whole, widths.compute)
        self._give(wide, widths.reduce)
        summed, kept = shard * widths.reduce, shard * widths.parameter
        waits = self._replicas > 1 and not self._last  # for the sums of replicas
        cast = widths.reduce != widths.parameter and not waits
        filed = self._ways.gradients == FILE  # where it is added to what is there
        adds = g in self._partial if waits else g in self._split and not filed
        # No rank is sent this, now: codes were, or replicas are, later.
        alone = (self._shards == 1 or bool(self._groups[g].sums)) and (self._replicas == 1 or waits)
        where = "gradients" if not (cast or adds) else "working" if alone else "messages"
        ledger.take(where, summed)
        if self._shards == 1:
            ledger.use("working", self._reduced(g))
        for crossing, sums in self._groups[g].sums:
            ledger.use("working", crossing + sums, crossing)
        if cast:
            ledger.take("working" if adds else "gradients", kept)
            ledger.give(where, 0 if self._replicas > 1 else summed)
            self._waiting += summed if self._replicas > 1 else 0
        if adds:
            ledger.give("working" if cast else where, kept if cast else summed)
        elif waits:
            self._partial[g] = summed
        elif self._updates is None:
            self._leave(g, kept)
        else:
            learning = (name for _, name, _ in self._groups[g].tensors if name not in self._groups[g].frozen)
            ledger.use("working", *NONE.or_more(*map(self._updates.__getitem__, learning)))
            ledger.give("gradients", kept)
        if not waits:
            ledger.give("gradients", self._partial.pop(g, 0))
        ledger.give("gradients", held)

    def _leave(self, g: int, size: int) -> None:
        """Takes a group's rows of gradients to where they wait; to a file through the host's memory, beside those of the group before,
        and what they are added to."""
        place, adds = self._ways.gradients, g in self._split
        self._split.add(g)
        if place != "gradients":
            self._ledger.give("gradients", size)
            self._ledger.take(place, 0 if adds else size)
        if place == FILE:
            through = size + BLOCK * len(self._groups[g].tensors)
            self._ledger.use(HOST, through * (1 + adds) + self._leaving)
            self._leaving = through

    def _give(self, gradients: dict[str, int], width: int) -> None:
        self._ledger.give("gradients", sum(gradients.values()) * width)
        gradients.clear()

    def _drop_buffer(self) -> None:
        if self._reducing is not None:
            self._ledger.give("messages", self._reduced(self._reducing))
            self._reducing = None

    def _gathered(self, g: int) -> int:
        return self._groups[g].shard_bytes(self._widths.compute) * self._shards

    def _reduced(self, g: int) -> int:
        return self._groups[g].reduced[0] * self._widths.reduce
