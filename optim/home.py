"""States that wait elsewhere than on the device, and steps in portions of them that come and go.

    fetch of the next portion        step of this one        way back of the one before        all at the same time

A portion is PORTION_BYTES of float32 parameters, with their gradients and states; one of a rule that takes a parameter as a whole
may be a larger parameter. Three of them exist at most. Communicates nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.portions import cut_row, row_unit
from rowwise.kernels.rows import local, tensors
from rowwise.kernels.torch_dtensor import laid_out_as
from rowwise.optim.rule import row_length

PORTION_BYTES = 16 << 20  # of float32 parameters that a rule is given at a time: its temporaries are a few times that


class Home(Protocol):
    """Where the states of an optimizer wait, and how rows come from where they wait and go back: of states, and of parameters and
    gradients, which may be on a device or wait too."""

    def lay(self, t: Tensor) -> Tensor:
        """Returns a tensor of the same numbers that waits there."""

    def fetch(self, there: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begins to bring contiguous tensors to the host's memory; what is returned waits for them, and gives them. What is in that
        memory already is given as it is."""

    def put(self, here: Sequence[Tensor], there: Sequence[Tensor]) -> Callable[[], None]:
        """Begins to bring what was fetched back to where it came from; what is returned waits for that."""


class Entry(NamedTuple):
    """What a rule is given of one matrix: this rank's rows of it, or some of them; its logical shape, and the logical row of the
    first."""

    name: str
    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    shape: torch.Size
    offset: int

    def rows(self, first: int, last: int) -> "Entry":
        """Returns the part of it that is some of its rows, where every state has them."""
        part = slice(first, last)
        state = {key: t[part] for key, t in self.state.items()}
        return Entry(self.name, self.param[part], self.grad[part], state, self.shape, self.offset + first)

    def tensors(self) -> list[Tensor]:
        """Returns the gradient, and all that a step changes."""
        return [self.grad, self.param, *self.state.values()]

    def moved(self, here: Sequence[Tensor]) -> "Entry":
        """Returns it with other tensors in the places of `tensors`."""
        grad, param, *states = here
        return self._replace(grad=grad, param=param, state=dict(zip(self.state, states, strict=True)))


class Portion(NamedTuple):
    """What a rule is given at once: entries of one group of parameters; `ranks`: those over which it sums what it needs of a whole
    matrix."""

    group: dict[str, Any]
    ranks: dist.ProcessGroup | None
    entries: list[Entry]


def laid(home: Home, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lays the states of a parameter down, split as they are."""
    found = {}
    for key, t in state.items():
        rows = home.lay(local(t))
        found[key] = laid_out_as(t, rows) if isinstance(t, tensors.DTensor) else rows
    return found


def cut(entries: Iterable[Entry], numbers: int) -> Iterator[list[Entry]]:
    """Cuts entries whose rows change each by itself into portions of so many numbers, or of the fewest rows that can be cut off."""
    portion: list[Entry] = []
    free = numbers
    for entry in entries:
        first, rows, columns = 0, entry.param.size(0), row_length(entry.param.shape)
        while first < rows:
            last = cut_row(first, rows, columns, free)
            if last == first and not portion:
                last = min(first + row_unit(columns), rows)
            if last > first:
                portion.append(entry.rows(first, last))
                free -= (last - first) * columns
                first = last
            if first < rows:
                yield portion
                portion, free = [], numbers
    if portion:
        yield portion


def step_through(home: Home, portions: Iterable[Portion], change: Callable[[Portion], None]) -> None:
    """Has `change` make the step of every portion, in order, on the host. Raises what the way of any of them raises."""
    ahead = iter(portions)
    coming, leave = _fetch(home, next(ahead, None)), None
    while coming is not None:
        there, bring = coming
        here = bring()
        coming = _fetch(home, next(ahead, None))
        change(here)
        if leave is not None:
            leave()
        leave = home.put(_changed(here), _changed(there))
    if leave is not None:
        leave()


def _fetch(home: Home, portion: Portion | None) -> tuple[Portion, Callable[[], Portion]] | None:
    if portion is None:
        return None
    bring = home.fetch([t for entry in portion.entries for t in entry.tensors()])

    def here() -> Portion:
        left = iter(bring())
        moved = [entry.moved([next(left) for _ in entry.tensors()]) for entry in portion.entries]
        return portion._replace(entries=moved)

    return portion, here


def _changed(portion: Portion) -> list[Tensor]:
    return [t for entry in portion.entries for t in entry.tensors()[1:]]
