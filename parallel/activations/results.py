"""The results that a layer makes on its way, as data: what the backward needs of it, and what it takes to make that again.

A layer makes each of its results through `make`, by name, from its input or from results before:

    make("n1", self.norm, x)

`plainly` makes it and no more; what is in its place where not everything is kept stands in `parallel.activations.recompute`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rowwise.kernels.activation_codes import CHANNELS, code_bytes

INPUT = "x"  # what a layer is given, among the results that others are made of and that its backward needs
Make = Callable[..., Any]  # (name, function, *what it takes): what the function gives of that, a tensor or several


@dataclass(frozen=True)
class Result:
    """A result that the backward needs. `numbers`: a token, in the dtype of computation. `operations`: to make it again, a token,
    and `pairs`: beside that a pair of a token and one that it sees (attention). `wide`: numbers a token that its making leaves in
    at least 32 bits whatever is chosen, and `fixed`: in the dtype of computation. `dear`: a product or attention makes it. A
    result that messages have gone into is kept whatever is chosen: its numbers are then `fixed`. `tensors`: how many equal ones it
    is; `heads`: the size of heads, where its numbers are those of heads, by which they are coded (`compress`); `of`: what it is made
    of, the layer's input and results before it."""

    name: str
    numbers: int
    operations: int
    pairs: int = 0
    wide: int = 0
    fixed: int = 0
    dear: bool = False
    tensors: int = 1
    heads: int | None = None
    of: tuple[str, ...] = (INPUT,)

    def cost(self, seen: float) -> float:
        """Counts the operations a token to make it again, where a token sees so many on the mean."""
        return self.operations + self.pairs * seen

    def bytes_waiting(self, kept: bool, itemsize: int, coded: bool) -> int:
        """Counts the bytes a token that wait for the backward where it is `kept`, or not: as they are or as codes."""
        return self.bytes(self.fixed + self.numbers * kept, itemsize, coded) + self.wide * max(4, itemsize)

    @property
    def columns(self) -> int:
        """Counts the numbers a token of each of its tensors."""
        return self.numbers // self.tensors

    def bytes(self, numbers: int, itemsize: int, coded: bool) -> int:
        """Counts the bytes of so many numbers of a token, as they are or as codes."""
        each = numbers // self.tensors
        return self.tensors * (code_bytes(each, self.heads or CHANNELS) if coded else each * itemsize)


class Sharing(NamedTuple):
    """How many ranks share each sequence: see `parallel.sequence`."""

    ulysses: int = 1
    ring: int = 1

    @property
    def size(self) -> int:
        return self.ulysses * self.ring

    @property
    def communicates(self) -> bool:
        return self.size > 1


@dataclass(frozen=True)
class LayerResults:
    """The results of a layer, in the order in which they are made; `input`: numbers a token of what it is given."""

    input: int
    results: tuple[Result, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(result.name for result in self.results)

    def bytes_kept(self, kept: frozenset[str], itemsize: int, coded: bool = False) -> int:
        """Counts the bytes a token that wait for the backward where the results named in `kept` stay, as they are or as codes."""
        waiting = sum(result.bytes_waiting(result.name in kept, itemsize, coded) for result in self.results)
        return self.input_bytes(itemsize, coded) + waiting

    def input_bytes(self, itemsize: int, coded: bool = False) -> int:
        """Counts the bytes a token of what it is given, as it is or as codes."""
        return code_bytes(self.input) if coded else self.input * itemsize

    def operations_again(self, kept: frozenset[str], seen: float) -> float:
        """Counts the operations a token that the backward makes again."""
        return sum(r.cost(seen) for r in self.results if r.numbers and r.name not in kept)


@dataclass(frozen=True)
class BackwardPiece:
    """A piece of a layer's backward, in bytes a token. `needs`: results; `during`: gradients and temporaries; `parameters`: how many
    of the layer's, counted from the last, have their gradients when it begins. Where weights' gradients are computed later: they
    need of it the results `inputs`, and gradients of `outputs` bytes from here on, beside which there are `beside`. `linears`: the
    linear layers that it goes through, by their paths in the layer, which are given what it needs."""

    needs: tuple[str, ...]
    during: int
    parameters: int
    outputs: int
    beside: int
    inputs: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerWork:
    """What a layer has at once beside what is kept of it, in bytes a token. `last`: what its forward makes at its end, beside all
    results; `alone`: the most in its forward where each result is let go of as soon as nothing of the layer takes it, its input among
    them; `backward`: the pieces of its backward, in their order."""

    last: int
    alone: int
    backward: tuple[BackwardPiece, ...]


def plainly(name: str, function: Callable[..., Any], *given: Any) -> Any:
    """Makes a result, all of whose tensors autograd keeps that its backward needs."""
    return function(*given)


def make_plainly(x: Tensor) -> Make:
    """Returns what a layer makes its results with where everything is kept."""
    return plainly
