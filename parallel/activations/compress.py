"""Kept results as 8-bit codes (Pan et al., *Mesa*): `kernels.activation_codes` has the formulas, `saved` the seam.

| result | numbers a token | groups |
|---|---|---|
| inputs of norms and linear layers, gate, up and product of the feed-forward | D or F | 256 channels |
| queries, keys, values, what attention gives | H E or K E | heads |

Kept as they are: a number a row (the reciprocal root mean square of norms, attention's log-sum-exp), since they are few and all
of a row hangs on them. Codes are drawn for the token's place in the order of the data and the number of its head, so that they
are the same on every layout: where ranks share a sequence by Ulysses, attention has some heads of all tokens of the ring's
rank; in a ring, the tokens of its order. A token's codes have ranges of their own, or running ones (`ranges`). Communicates
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.activation_codes import Codes, Groups, channel_groups, decode, encode
from rowwise.kernels.attention import Attend
from rowwise.kernels.look import PLAINLY, Look
from rowwise.kernels.philox import stream_key
from rowwise.kernels.torch_storage import StorageWeakRef, memory_key, weak_storage
from rowwise.kernels.visible import Documents
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.activations.saved import Formed, Keeper
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import RingAttention, SequenceAttention, positions_of, ring_positions

COMPILED_CODES: Refusals = (
    Refusal(
        ("memory.compress", "compile"),
        lambda run: run.memory.compress != "none" and run.compile,
        "memory.compress={memory.compress} with compile=true: what a compiled block keeps is the compiler's choice, and no longer "
        "the same results on every layout; give compile=false, or memory.compress=none",
    ),
)
SHARED_CODES: Refusals = (
    Refusal(
        ("memory.compress", "memory.recompute", "parallel.ulysses", "parallel.ring"),
        lambda run: (
            run.memory.compress != "none"
            and run.memory.recompute != "none"
            and run.parallel.ulysses * run.parallel.ring > 1
        ),
        "memory.compress={memory.compress} with memory.recompute={memory.recompute} parallel.ulysses={parallel.ulysses} "
        "parallel.ring={parallel.ring}: ranks that share sequences keep what others make again, and codes of it are other numbers; "
        "give memory.recompute=none, or whole sequences",
    ),
)
LEAST_NUMBERS = 8  # of a token: fewer are kept as they are, a reciprocal root mean square say


@dataclass(frozen=True)
class Tokens:
    """Which tokens of every sequence of `length` this rank has, `own`, and its attention sees, `seen`: positions, on its device."""

    length: int
    own: Tensor
    seen: Tensor

    def numbers(self, first: int, sequences: int, attention: bool) -> Tensor:
        """Numbers the tokens of sequences from `first` on, in the order of the data: int64 (B S,); padding is none, -1."""
        places = self.seen if attention else self.own
        begins = torch.arange(first, first + sequences, device=places.device) * self.length
        return (begins[:, None] + places).where(places < self.length, -1).flatten()


def tokens_on(mesh: Mesh, length: int) -> Tokens:
    """Tells which tokens, of sequences of `length`, this rank has: all, or its part of them, of which attention sees that of its
    place in the ring."""
    if mesh.sequence is None:
        own = seen = torch.arange(length)
    else:
        own, seen = positions_of(mesh.sequence, length), ring_positions(mesh.sequence, length)
    return Tokens(length, own.to(mesh.device), seen.to(mesh.device))


class Coding:
    """The codes of one forward of a block that is given x (B, S, D), of sequences from number `first` on. What attention takes and
    gives is told by `name`; all else is numbered as it comes. `running`: the ranges of all tokens; None: each has its own."""

    def __init__(
        self, seed: int, tokens: Tokens, layer: str, first: int, x: Tensor, running: RunningRanges | None = None
    ):
        self._seed, self._layer, self._tokens, self._first = seed, layer, tokens, first
        self._running = running
        self._sequences, self._length = x.shape[:2]
        self._numbers: dict[bool, Tensor] = {}  # of tokens
        self._named: dict[tuple[int, ...], tuple[StorageWeakRef, str, Groups, bool]] = {}
        self._keys: tuple[Groups, int, torch.dtype] | None = None
        self._count = 0

    def name(self, t: Tensor, name: str, groups: Groups, attention: bool) -> None:
        """Says that `t` (B, S, heads, E) is queries, keys, values or outcome of attention: of the tokens that attention sees here,
        or of this rank's own."""
        if t.is_contiguous():
            self._named[memory_key(t)] = weak_storage(t), name, groups, attention

    def name_block(self, k: Tensor, groups: Groups) -> None:
        """Says that keys and values like `k` may come together, as a ring passes them on: (2, B, S, heads, E)."""
        self._keys = groups, k[0, 0].numel(), k.dtype

    def of(self, t: Tensor, learns: bool) -> Formed | None:
        """Says how to keep a result of which `t` is a view; None: as it is. `learns`: it has a gradient, which the log-sum-exp has
        not."""
        B, S = self._sequences, self._length
        if (key := memory_key(t)) in self._named:  # whose storage keeps its name as long as we know of it
            _, name, groups, attention = self._named[key]
            tokens = self._tokens_of(attention)
            return self._formed([(name, groups)], t.numel() // len(tokens), t.dtype, attention)
        if t.ndim == 5 and self._keys is not None:
            keys, columns, dtype = self._keys
            return self._formed([("k", keys), ("v", keys)], columns, dtype, attention=True)
        by_token = t.is_contiguous() and (t.shape[:2] == (B, S) or (t.ndim == 2 and t.size(0) == B * S))
        if not learns or not by_token or t.size(-1) < LEAST_NUMBERS:
            return None
        self._count += 1
        columns = t.numel() // (B * S)
        groups = Groups(t.size(-1), t.size(2)) if t.ndim == 4 else channel_groups(columns)
        return self._formed([(str(self._count), groups)], columns, t.dtype, attention=False)

    def _formed(self, parts: Sequence[tuple[str, Groups]], columns: int, dtype: torch.dtype, attention: bool) -> Formed:
        width = parts[0][1].width
        given = [self._given(name, groups, columns) for name, groups in parts]

        def make(memory: Tensor) -> list[Tensor]:
            tokens = self._tokens_of(attention)
            kept: list[Tensor] = []
            for x, (name, groups), within in zip(memory.view(len(parts), -1, columns), parts, given, strict=True):
                if self._running is not None:
                    self._running.see(f"{self._layer}.{name}", x, groups, tokens)
                key = stream_key(self._seed, f"activations/{self._layer}/{name}")
                made = encode(x, groups, key, tokens, within)
                kept += made if within is None else (made.codes,)
            return kept

        def rebuild(kept: Sequence[Tensor]) -> Tensor:
            left, found = iter(kept), list[Tensor]()
            for within in given:
                codes = next(left)
                ranges = next(left) if within is None else within.expand(len(codes), -1, -1)
                found.append(decode(Codes(codes, ranges), width, dtype).view(-1))
            return found[0] if len(found) == 1 else torch.cat(found)

        return Formed(make, rebuild)

    def _given(self, name: str, groups: Groups, columns: int) -> Tensor | None:
        """The running ranges of the groups of a token's `columns` numbers; None where each token has its own."""
        if self._running is None:
            return None
        return self._running.within(f"{self._layer}.{name}", groups, -(-columns // groups.width))

    def _tokens_of(self, attention: bool) -> Tensor:
        if attention not in self._numbers:
            self._numbers[attention] = self._tokens.numbers(self._first, self._sequences, attention)
        return self._numbers[attention]


@dataclass(frozen=True)
class NamedOutcome:
    """Attention whose outcome (B, S, H, E), of this rank's tokens, what keeps it knows."""

    keeper: Keeper
    attend: Attend

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, look: Look = PLAINLY
    ) -> Tensor:
        y = self.attend(q, k, v, documents, look)
        if (scope := self.keeper.scope) is not None and isinstance(scope.form, Coding):
            scope.form.name(y, "out", Groups(y.size(3), y.size(2)), attention=False)
        return y


@dataclass(frozen=True)
class NamedAttention:
    """Attention of which what keeps them knows queries, keys, values and outcome. It has the `share`-th of `shares` equal parts of
    the heads, of all tokens of the ring's rank; the model has `key_heads`."""

    keeper: Keeper
    attend: Attend
    key_heads: int
    share: int = 0
    shares: int = 1

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, look: Look = PLAINLY
    ) -> Tensor:
        scope = self.keeper.scope
        if scope is None or not isinstance(scope.form, Coding):
            return self.attend(q, k, v, documents, look)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # after an all-to-all they are parts of what came
        heads = Groups(q.size(3), q.size(2) * self.shares, q.size(2) * self.share)
        here = k.size(2)  # of as many as are repeated until all ranks have some
        keys = Groups(k.size(3), self.key_heads, here * self.share, here * self.shares // self.key_heads)
        for t, name, groups in ((q, "q", heads), (k, "k", keys), (v, "v", keys)):
            scope.form.name(t, name, groups, attention=True)
        scope.form.name_block(k, keys)
        with scope.waits():
            out = self.attend(q, k, v, documents, look)
            scope.form.name(out, "out", heads, attention=True)
        return out


def named_attention(keeper: Keeper, attend: Attend, key_heads: int) -> Attend:
    """Makes of `attend` one of whose results `keeper` makes codes."""
    if isinstance(attend, SequenceAttention):
        ulysses, inner = attend.axes.ulysses, attend.around or RingAttention(attend.axes)
        around = NamedAttention(keeper, inner, key_heads, ulysses.rank, ulysses.size)
        return NamedOutcome(keeper, replace(attend, around=around))
    return NamedAttention(keeper, attend, key_heads)
