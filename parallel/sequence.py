"""Attention over sequences that several ranks share: Ulysses inside, a ring outside (Fang & Zhao, *USP*).

Every rank holds 1 / (ring x ulysses) of each sequence: its embeddings, activations, logits and losses. Only attention
looks at other tokens:

- **Ulysses** (Jacobs et al., *DeepSpeed Ulysses*): an all-to-all turns queries, keys and values (B, S / U, H, E) into
  (B, S, H / U, E), and another turns what attention gives back. With fewer key heads than ranks, they are repeated until
  each rank has those that its query heads look at.
- **Ring** (Liu et al., *Ring Attention*): keys and values travel round the ring, the next block while the present one is
  looked at; what was seen merges by its log-sum-exp (`kernels.attention`). In the backward they travel again, and the
  gradients of each block with it, back to where it came from.

The order says which tokens a rank of the ring has: `contiguous` an R-th, `zigzag` the i-th of 2 R chunks and the i-th from
the end, `striped` every R-th token (Brandon et al., *Striped Attention*). The last two give every rank the same work.

Bytes a rank sends for each layer and micro-batch, with b = B S / (U R) tokens of itemsize i, and KV the key heads after
repeating: Ulysses (U - 1) / U b (2 H + 2 KV) E i forward and as much backward; the ring (R - 1) b 2 KV E i forward, and
backward as much again and R b 2 KV E x 4 bytes (8 in float64) of gradients.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.attention import Attend, causal_attention, nothing_seen, see, see_backward
from rowwise.kernels.attention_block import Attended, repeat_heads
from rowwise.kernels.look import PLAINLY, Look
from rowwise.kernels.torch_compiler import left_to_python
from rowwise.kernels.visible import Documents, Run, visible_areas
from rowwise.parallel.collectives import Passing, all_to_all
from rowwise.parallel.config import RING_ORDER, divisors
from rowwise.parallel.mesh import Axis, Mesh, SequenceAxes

HEADS: Refusals = (
    Refusal(
        ("parallel.ulysses", "model.heads"),
        lambda run: run.model.heads % run.parallel.ulysses,
        lambda run: (
            f"parallel.ulysses={run.parallel.ulysses} with model.heads={run.model.heads}: its ranks take equal shares of "
            f"the heads; possible are {divisors(run.model.heads)}, and parallel.ring for more ranks"
        ),
    ),
)


def padded_length(length: int, order: RING_ORDER, ring: int, ulysses: int) -> int:
    """Returns the least length from `length` on that `ring` x `ulysses` ranks can share: what is missing is padding behind the
    last token, which no token sees."""
    multiple = ring * (math.lcm(2, ulysses) if order == "zigzag" and ring > 1 else ulysses)
    return -(-length // multiple) * multiple


def runs_of(order: RING_ORDER, rank: int, ring: int, length: int) -> tuple[Run, ...]:
    """Returns the tokens, of `length`, that a rank of the ring has, in the order in which it has them."""
    if order == "striped":
        return (Run(rank, ring, length // ring),)
    if order == "contiguous" or ring == 1:
        return (Run(rank * (length // ring), 1, length // ring),)
    chunk = length // (2 * ring)
    return Run(rank * chunk, 1, chunk), Run((2 * ring - 1 - rank) * chunk, 1, chunk)


def ring_positions(axes: SequenceAxes, length: int) -> Tensor:
    """Returns the positions in a sequence of `length` tokens that this rank's place in the ring has, over its ranks of Ulysses;
    those from `length` on are padding."""
    ring, ulysses = axes.ring, axes.ulysses
    runs = runs_of(axes.order, ring.rank, ring.size, padded_length(length, axes.order, ring.size, ulysses.size))
    return torch.cat([run.start + run.stride * torch.arange(run.length) for run in runs])


def positions_of(axes: SequenceAxes, length: int) -> Tensor:
    """Returns the positions in a sequence of `length` tokens that this rank has; those from `length` on are padding."""
    return ring_positions(axes, length).chunk(axes.ulysses.size)[axes.ulysses.rank]


def positions_on(mesh: Mesh, length: int) -> Tensor | None:
    """Returns the positions of this rank, or None where it has whole sequences."""
    return None if mesh.sequence is None else positions_of(mesh.sequence, length)


@dataclass(frozen=True)
class RingAttention:
    """Attention as `kernels.attention.causal_attention`, of the tokens that each rank of a ring has."""

    axes: SequenceAxes

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, look: Look = PLAINLY
    ) -> Tensor:
        if self.axes.ring.size == 1:
            return causal_attention(q, k, v, documents, look)
        return ring_attention(q, k, v, documents, look, self.axes)


@dataclass(frozen=True)
class SequenceAttention:
    """Attention as `kernels.attention.causal_attention`, of what each rank has of the sequences. `around`: does it for
    the ring, with some of the heads of all tokens that this rank's place in it has; None: `RingAttention`."""

    axes: SequenceAxes
    around: Attend | None = None

    @left_to_python  # messages
    def __call__(
        self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, documents: Documents | None = None, look: Look = PLAINLY
    ) -> Tensor:
        ulysses, around = self.axes.ulysses, self.around or RingAttention(self.axes)
        if ulysses.size == 1:
            return around(q_BSHE, k_BSKE, v_BSKE, documents, look)
        return to_tokens(around(*to_heads(q_BSHE, k_BSKE, v_BSKE, ulysses), documents, look), ulysses)


def attention_on(mesh: Mesh) -> Attend:
    """Returns what a model on this mesh attends with."""
    return causal_attention if mesh.sequence is None else SequenceAttention(mesh.sequence)


def to_heads(q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, ulysses: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Passes from all heads of this rank's tokens to this rank's heads of all ranks' tokens: (B, U S, H / U, E), and keys and
    values with max(1, K / U) heads where one of K and U divides the other. One all-to-all."""
    U = ulysses.size
    key_heads = math.lcm(k_BSKE.size(2), U)
    tensors = q_BSHE, repeat_heads(k_BSKE, key_heads, dim=2), repeat_heads(v_BSKE, key_heads, dim=2)
    parts_UBSHE = [t.unflatten(2, (U, -1)).movedim(2, 0) for t in tensors]
    sizes = [part.size(3) for part in parts_UBSHE]
    came_UBSHE = all_to_all(torch.cat(parts_UBSHE, dim=3), ulysses)
    q, k, v = came_UBSHE.movedim(0, 1).flatten(1, 2).split(sizes, dim=2)
    return q, k, v


def to_tokens(y_BSHE: Tensor, ulysses: Axis) -> Tensor:
    """Passes back from this rank's heads of all tokens to all heads of its own."""
    came_UBSHE = all_to_all(y_BSHE.unflatten(1, (ulysses.size, -1)).movedim(1, 0), ulysses)
    return came_UBSHE.movedim(0, 2).flatten(2, 3)


def rotate(block: Tensor, ring: Axis) -> Iterator[tuple[int, Tensor]]:
    """Yields the block of every rank of the ring in turn, with its rank, this rank's own first; the next one travels while the
    caller looks at one."""
    for step in range(ring.size - 1):
        coming = Passing(block, ring)
        yield (ring.rank - step) % ring.size, block
        block = coming.wait()
        del coming  # and with it the block before
    yield (ring.rank + 1) % ring.size, block


def ring_attention(
    q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, documents: Documents | None, look: Look, axes: SequenceAxes
) -> Tensor:
    """Computes attention of the sequences of which this rank of the ring has the tokens of the axes' order."""
    return _RingAttention.apply(q_BSHE, k_BSKE, v_BSKE, documents, look, axes.ring, axes.order)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None,
        look: Look,
        ring: Axis,
        order: RING_ORDER,
    ) -> Tensor:
        length = q.size(1) * ring.size
        own = runs_of(order, ring.rank, ring.size, length)
        ctx.ring, ctx.look, ctx.areas = ring, look.at(length), {}
        # After an all-to-all, a view of what came would keep the keys and values that are in the block.
        q, block = q.contiguous(), torch.stack((k, v))
        out, lse = nothing_seen(q)
        for source, (k_there, v_there) in rotate(block, ring):
            theirs = runs_of(order, source, ring.size, length)
            ctx.areas[source] = visible_areas(own, theirs, documents, ctx.look.window)
            see(q, k_there, v_there, ctx.areas[source], out, lse, ctx.look)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, block, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, block, out, lse = ctx.saved_tensors
        d_q = torch.zeros_like(q, dtype=lse.dtype)
        under_way: Passing | None = None
        for source, (k, v) in rotate(block, ctx.ring):
            here = torch.zeros_like(block, dtype=lse.dtype)
            attended = Attended(q, k, v, out, lse)
            see_backward(d_out, attended, ctx.areas[source], (d_q, here[0], here[1]), ctx.look)
            if under_way is not None:
                # What the ranks before gave to this block's gradient has travelled one step behind it.
                here += under_way.wait()
                under_way = None  # before the next makes room
            under_way = Passing(here, ctx.ring)
        assert under_way is not None
        d_k, d_v = under_way.wait()
        return d_q.to(q.dtype), d_k.to(q.dtype), d_v.to(q.dtype), None, None, None, None
