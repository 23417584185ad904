"""What a step holds of the parameters of one stage beside a rank's rows: whole ones, gradients, and messages of both.

Two ways, as `parallel` has two: `Replicated` (`parallel.replicate`), whose gradients lie in buckets that stay, and FSDP2's
(`plan.sharded`). The pieces of a stage are counted from 0: the embedding, its layers, the head.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from rowwise.trainer.adapters.specs import is_added
from rowwise.trainer.plan.ledger import Ledger
from rowwise.trainer.plan.update import NONE, Updates


class Weights(Protocol):
    """How the parameters of a stage come and go."""

    def begin(self, last: bool) -> None:
        """Begins the forward of a micro-batch; after the `last` one gradients cross ranks."""

    def enter(self, piece: int) -> None:
        """Begins the forward of a piece."""

    def leave(self, piece: int) -> None:
        """Ends the forward of a piece."""

    def end_forward(self) -> None:
        """Ends the forward of the stage."""

    def enter_back(self, piece: int) -> None:
        """Begins the backward of a piece."""

    def holds(self, piece: int) -> bool:
        """Says whether an earlier micro-batch has left the gradients of a piece, whole, to which this one's are added."""

    def add_gradients(self, piece: int, count: int, gone: int = 0) -> None:
        """Takes in the gradients of a piece's parameters, of so many counted from the last; `gone`: bytes that are let go of before
        any of them is used."""

    def leave_back(self, piece: int) -> None:
        """Ends the backward of a piece."""

    def end_backward(self) -> None:
        """Ends the backward of the stage."""

    def keep(self, keeps: bool) -> None:
        """Says whether the coming forward or backward leaves its parameters gathered."""

    def add_up(self) -> None:
        """Adds gradients up in 32 bits, after each action of a pipeline that leaves some."""

    def reduce(self) -> None:
        """Sends gradients across ranks, after the last action that leaves some."""

    def close(self) -> None:
        """Ends a pipeline's step."""


def arrivals(names: Sequence[str], frozen: Collection[str]) -> list[list[str]]:
    """Lists, for each parameter of the model's own of a piece, counted from the last, the names of what has its gradient when that
    would have: itself, and what of an adapter stands beside it."""
    found: list[list[str]] = []
    beside: list[str] = []
    for name in reversed(names):
        if is_added(name):
            beside.append(name)
            continue
        found.append([one for one in (*beside, name) if one not in frozen])
        beside = []
    return found


class Replicated:
    """Whole parameters and buckets of whole gradients (none where the optimizer steps in the backward). `tensors`: the numbers of
    each parameter, by piece, of which the `frozen` have no gradient; `sums`, `updates`: as in `Sharded`."""

    def __init__(
        self,
        ledger: Ledger,
        tensors: Sequence[Mapping[str, int]],
        width: int,
        sums: bool = False,
        updates: Updates | None = None,
        frozen: Collection[str] = (),
    ):
        self._ledger, self._width, self._sums, self._forwards = ledger, width, sums, 0
        self._arrivals = [
            [[(name, piece[name]) for name in names] for names in arrivals([*piece], frozen)] for piece in tensors
        ]
        self._updates = updates
        self._done = dict[int, int]()  # of each piece's parameters, counted from the last, in the backward under way
        if updates is None:
            learning = (n for piece in self._arrivals for together in piece for _, n in together)
            ledger.take("gradients", sum(learning) * width)

    def begin(self, last: bool) -> None:
        self._forwards += 1

    def holds(self, piece: int) -> bool:
        return self._sums or self._forwards > 1

    def enter(self, piece: int) -> None: ...
    def leave(self, piece: int) -> None: ...
    def end_forward(self) -> None: ...
    def enter_back(self, piece: int) -> None: ...
    def end_backward(self) -> None: ...
    def keep(self, keeps: bool) -> None: ...
    def reduce(self) -> None: ...
    def close(self) -> None: ...

    def add_gradients(self, piece: int, count: int, gone: int = 0) -> None:
        # One at a time, on its way into its bucket or into the sum that is there, or until its parameter has changed.
        category = "working" if self._sums else "gradients"
        some = self._arrivals[piece][self._done.get(piece, 0) : count]
        for name, numbers in (entry for together in some for entry in together):
            self._ledger.take(category, numbers * self._width)
            most, messages = NONE if self._updates is None else self._updates[name]
            self._ledger.use("working", max(messages, most - gone), messages)
            self._ledger.give(category, numbers * self._width)
        self._done[piece] = count

    def leave_back(self, piece: int) -> None:
        self._done.clear()

    def add_up(self) -> None:
        self._done.clear()  # weights' gradients may come several times in a row
