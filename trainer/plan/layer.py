"""What a layer holds in its backward, from moment to moment: gradients of its results, what is made again, and what is still kept.

The layer of Llama and Qwen3 is told as the pieces of its backward, in their order (`pieces_of_backward`): which results each needs
(`trainer.models.blocks`), and how many bytes a token of gradients and temporaries are there during it and after it. A result that
is not kept is made again, with all that it is made of, when it is first needed, and held until it is needed no more
(`parallel.activations.recompute`).
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from rowwise.parallel.activations.results import LayerResults
from rowwise.trainer.models.config import ModelConfig


@dataclass(frozen=True)
class BackwardPiece:
    """A piece of a layer's backward, in bytes a token. `needs`: results; `during`: gradients and temporaries; `parameters`: how many
    of the layer's, counted from the last, have their gradients when it begins. Where weights' gradients are computed later: they
    need of it the results `inputs`, and gradients of `outputs` bytes from here on, beside which there are `beside`."""

    needs: tuple[str, ...]
    during: int
    parameters: int
    outputs: int
    beside: int
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moment:
    """Of a layer's backward, bytes a token: of what was kept `released` are gone, `working` are there beside what is left of it, and
    `deferred` wait for the weights' gradients. `parameters`: as in `BackwardPiece`."""

    released: int
    working: int
    deferred: int
    parameters: int


ALL = 1 << 30  # parameters: more than a layer has

# What each result of the layer is made of.
MADE_OF = {
    "n1": (),
    "qkv": ("n1",),
    "qk": ("qkv",),
    "y": ("qkv", "qk"),
    "h": ("y",),
    "n2": ("h",),
    "gate_up": ("n2",),
    "s": ("gate_up",),
}


def pieces_of_backward(model: ModelConfig, width: int, gpu: bool) -> tuple[BackwardPiece, ...]:
    """Lists the pieces of the layer's backward for numbers of `width` bytes. A `gpu` makes that of a norm in one operator, and adds
    the gradients of queries up in float32."""
    c, w = width, max(4, width)
    d, f, q, k = (
        n * c for n in (model.dim, model.ffn_dim, model.heads * model.head_size, model.kv_heads * model.head_size)
    )
    # Of a norm: x / r, the gradient, its product with the weight, one more product.
    norm = d if gpu else (3 if c == w else 4) * model.dim * w
    turned = max(3 * q, 0 if gpu or not model.qk_norm else 4 * q // c * w)
    sums = q // c * w if gpu and c < w else 0
    looked, turned_of = ("y", "qkv", *(("qk",) if model.qk_norm else ())), ("qkv",) if model.qk_norm else ()
    return (
        BackwardPiece(("s",), d + f, 0, d, f, ("s",)),
        BackwardPiece(("gate_up",), d + 3 * f, 1, f, 2 * f),
        BackwardPiece(("gate_up",), d + 3 * f, 1, f, f),
        BackwardPiece(("n2",), max(2 * d + 2 * f, 3 * d + f), 1, 0, 2 * d, ("n2",)),
        BackwardPiece(("h",), 2 * d + norm, 3, d, d + norm),
        BackwardPiece(("y",), d + q, 4, 0, q, ("y",)),
        BackwardPiece(looked, d + 2 * q + 2 * k + sums, 5, k, 2 * q + k + sums),
        BackwardPiece(turned_of, d + q + 2 * k + turned, 5, q + k, turned),
        BackwardPiece(("n1",), 3 * d + q + 2 * k, 5, 0, 2 * d, ("n1",)),
        BackwardPiece((), 2 * d + norm, 10, 0, d + norm),
    )


def moments(
    table: LayerResults, kept: frozenset[str], pieces: Sequence[BackwardPiece], width: int, split: bool
) -> tuple[Moment, ...]:
    """Walks through a layer's backward; the last moment is its end. `split`: weights' gradients come later."""
    made = {result.name: result for result in table.results}
    last = {name: n for n, piece in enumerate(pieces) for name in piece.needs if name in made}
    waiting = {name for piece in pieces for name in piece.inputs} if split else set()
    again, released, outputs, found = set[str](), 0, 0, []
    for n, piece in enumerate(pieces):
        for name in piece.needs:
            _make(name, made.keys(), kept, again)
        outputs += piece.outputs if split else 0
        held = sum(made[name].numbers * width for name in again - waiting)
        deferred = outputs + sum(made[name].numbers * width for name in again & waiting)
        found.append(Moment(released, held + (piece.beside if split else piece.during), deferred, piece.parameters))
        for name in (name for name, end in last.items() if end == n):
            released += made[name].wide * max(4, width) + made[name].fixed * width
            released += made[name].numbers * width * (name in kept - waiting)
        again = {name for name in again if name in waiting or last.get(name, -1) > n}
    deferred = outputs + sum(made[name].numbers * width for name in waiting)
    return (*found, Moment(table.bytes_kept(kept, width), table.input * width, deferred, ALL))


def _make(name: str, known: Container[str], kept: frozenset[str], again: set[str]) -> None:
    """Makes a result again, and what it is made of, unless it is there."""
    if name in known and name not in kept and name not in again:
        for given in MADE_OF.get(name, ()):
            _make(given, known, kept, again)
        again.add(name)
