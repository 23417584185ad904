"""Causal attention between the tokens of packed sequences that see each other, block by block, and no others.

    S = scale Q K^T        out = softmax(S) V over the keys that a query sees        lse = log sum exp(S)

(Vaswani et al.; Dao, *FlashAttention-2*, for lse, and for a backward that keeps no scores.) Blocks of keys merge by

    lse = log(e^lse1 + e^lse2),    out = e^(lse1 - lse) out1 + e^(lse2 - lse) out2.

What queries see (`kernels.visible`) is looked at by the device's fastest operator that gives lse, area by area
(`kernels.attention_block`) or, where that operator takes several, in one call (`kernels.attention_packed`); no mask is ever
made, and what is not seen is not computed. No operator of torch caps scores: capped ones (`kernels.look`) are made by a kernel of our
own on CUDA, elsewhere in tiles by plain torch, and made again in the backward, so that memory is linear in S.

Shapes: B sequences, S queries, T keys, H heads, K key/value heads, E head dim. Sums are kept in float32, or float64.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.attention_block import Attended, Gradients, block_backward, block_forward, repeat_heads
from rowwise.kernels.attention_packed import packed_backward, packed_forward, packings, packs, taken
from rowwise.kernels.logit_form import LogitForm
from rowwise.kernels.look import PLAINLY, Look
from rowwise.kernels.torch_compiler import left_to_python
from rowwise.kernels.visible import Area, Documents, Run, tiles, visible_areas

# What looks from queries (B, S, H, E) at keys and values (B, S, K, E), each inside its document: `causal_attention`, or
# what does the same where a sequence is shared.
Attend = Callable[[Tensor, Tensor, Tensor, Documents | None, Look], Tensor]


def causal_attention(
    q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, documents: Documents | None = None, look: Look = PLAINLY
) -> Tensor:
    """Computes attention of whole sequences, (B, S, H, E); each token sees its document up to itself, or the window of `look`. H is
    a multiple of K: query head h looks at key head h K / H."""
    look = look.at(q_BSHE.size(1))
    if documents is not None or look.window is not None or look.cap is not None:
        return _attention_by_areas(q_BSHE, k_BSKE, v_BSKE, documents, look)
    if not torch.compiler.is_compiling():
        return _WholeAttention.apply(q_BSHE, k_BSKE, v_BSKE, look)
    if q_BSHE.is_cuda and q_BSHE.dtype == torch.float32:  # there torch knows no groups but by whole scores
        k_BSKE, v_BSKE = (repeat_heads(t, q_BSHE.size(2), dim=2) for t in (k_BSKE, v_BSKE))
    y_BHSE = F.scaled_dot_product_attention(
        q_BSHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        is_causal=True,
        scale=look.scale,
        enable_gqa=q_BSHE.size(2) != k_BSKE.size(2),
    )
    return y_BHSE.transpose(1, 2)


class _WholeAttention(torch.autograd.Function):
    """torch's attention by the operator that gives the log-sum-exp, so that on every device what is kept is q, k, v, out, lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        ctx.form = look.form(q.size(-1))
        out, lse = block_forward(q, k, v, True, ctx.form)
        out = out.contiguous()  # as the products behind it take it
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *block_backward(d_out, Attended(*ctx.saved_tensors), True, ctx.form), None


@left_to_python  # the areas differ from batch to batch
def _attention_by_areas(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, look: Look) -> Tensor:
    return _AttentionByAreas.apply(q, k, v, documents, look)


class _AttentionByAreas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, look: Look) -> Tensor:
        run = (Run(0, 1, q.size(1)),)
        ctx.areas, ctx.look = visible_areas(run, run, documents, look.window), look
        out, lse = nothing_seen(q)
        see(q, k, v, ctx.areas, out, lse, look, once=look.window is None)  # then a triangle for each document
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        attended = Attended(*ctx.saved_tensors)
        q, k, v = (torch.zeros_like(t, dtype=attended.lse.dtype) for t in attended[:3])
        see_backward(d_out, attended, ctx.areas, (q, k, v), ctx.look)
        return *(gradient.to(d_out.dtype) for gradient in (q, k, v)), None, None


def nothing_seen(q_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what queries have before they see a key: out (B, S, H, E) of zeros, and lse (B, H, S) of minus infinity."""
    wide = torch.float64 if q_BSHE.dtype == torch.float64 else torch.float32
    B, S, H, _ = q_BSHE.shape
    return q_BSHE.new_zeros(q_BSHE.shape, dtype=wide), q_BSHE.new_full((B, H, S), -torch.inf, dtype=wide)


def see(
    q: Tensor, k: Tensor, v: Tensor, areas: tuple[Area, ...], out: Tensor, lse: Tensor, look: Look, once: bool = False
) -> None:
    """Adds to (`out`, `lse`), in place, what queries (B, S, H, E) see in keys and values (B, T, K, E). `once`: no query is
    in two of the areas and none has seen a key before, so that there is nothing to merge."""
    form = look.form(q.size(-1))
    if packs(q, areas, form):
        _see_packed(q, k, v, areas, out, lse, form)
        return
    for area in areas if form.cap is None else _in_tiles(areas, q):
        rows, seen = _slices(area)
        here, k_here, v_here = (_ordered(t, area) for t in (q[rows], k[seen], v[seen]))
        part, part_lse = block_forward(here, k_here, v_here, area.causal, form)
        part, part_lse = _ordered(part, area), _ordered(part_lse, area, dim=2)
        lse_here = lse[rows[0], :, rows[1]]
        if once and form.cap is None:
            out[rows], lse_here[:] = part, part_lse
        else:
            _merge_(out[rows], lse_here, part, part_lse)


def see_backward(d_out: Tensor, attended: Attended, areas: tuple[Area, ...], sums: Gradients, look: Look) -> None:
    """Adds to `sums`, in place, what these areas give of the gradients of q, k and v. `out` and `lse` are those of all keys
    that the queries see, anywhere."""
    q, k, v, out, lse = attended
    form = look.form(q.size(-1))
    if packs(q, areas, form):
        _see_packed_backward(d_out, attended, areas, sums, form)
        return
    for area in areas if form.cap is None else _in_tiles(areas, q):
        rows, seen = _slices(area)
        lse_here = _ordered(lse[rows[0], :, rows[1]], area, dim=2).contiguous()  # FlashAttention reads it as if it were
        d_out_here, q_here, out_here = (_ordered(t[rows], area) for t in (d_out, q, out))
        here = Attended(q_here, _ordered(k[seen], area), _ordered(v[seen], area), out_here, lse_here)
        gradients = block_backward(d_out_here, here, area.causal, form)
        for total, index, gradient in zip(sums, (rows, seen, seen), gradients, strict=True):
            total[index].add_(_ordered(gradient, area))


# Scores of a tile, of all heads and sequences: on a CPU it stays in the cache, on a GPU it fills the device.
TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 25}


def tile_side(sequences: int, heads: int, device: str) -> int:
    """Gives the queries, and the keys, of a tile of capped scores: a power of two, from 32 to 1,024."""
    scores = TILE_SCORES.get(device, TILE_SCORES["cpu"]) // (sequences * heads)
    return min(1024, max(32, 1 << (scores.bit_length() - 1) // 2))


def _in_tiles(areas: tuple[Area, ...], q_BSHE: Tensor) -> Iterator[Area]:
    side = tile_side(q_BSHE.size(0), q_BSHE.size(2), q_BSHE.device.type)
    return (tile for area in areas for tile in tiles(area, side))


def _ordered(t: Tensor, area: Area, dim: int = 1) -> Tensor:
    """What an area has of queries or keys, in the order in which the n-th sees the first n, and back."""
    return t.flip(dim) if area.turned else t


def _see_packed(
    q: Tensor, k: Tensor, v: Tensor, areas: tuple[Area, ...], out: Tensor, lse: Tensor, form: LogitForm
) -> None:
    for packing in packings(areas, *q.shape[:2], k.size(1), q.device):
        k_here, v_here = (taken(t, packing.keys) for t in (k, v))
        part, part_lse = packed_forward(taken(q, packing.queries), k_here, v_here, packing, form)
        # As one sequence, so that both are (1, N, H, E) and (1, H, N).
        out_here, lse_here = taken(out, packing.queries)[None], taken(lse.transpose(1, 2), packing.queries).T[None]
        _merge_(out_here, lse_here, part[None], part_lse[None])
        _put_(out, packing.queries, out_here[0])
        _put_(lse.transpose(1, 2), packing.queries, lse_here[0].T)


def _see_packed_backward(
    d_out: Tensor, attended: Attended, areas: tuple[Area, ...], sums: Gradients, form: LogitForm
) -> None:
    q, k, v, out, lse = attended
    for packing in packings(areas, *q.shape[:2], k.size(1), q.device):
        d_out_here, q_here, out_here = (taken(t, packing.queries) for t in (d_out, q, out))
        k_here, v_here = (taken(t, packing.keys) for t in (k, v))
        lse_here = taken(lse.transpose(1, 2), packing.queries).T
        here = Attended(q_here, k_here, v_here, out_here, lse_here)
        gradients = packed_backward(d_out_here, here, packing, form)
        for total, gradient, index in zip(sums, gradients, (packing.queries, packing.keys, packing.keys), strict=True):
            if index is None:
                total += gradient.view(total.shape)
            else:  # a key may be in several areas
                total.view(-1, *total.shape[2:]).index_add_(0, index, gradient.to(total.dtype))


def _put_(t: Tensor, index: Tensor | None, rows: Tensor) -> None:
    """Sets the rows of (B, S, ...) at `index`, None for all."""
    whole = rows if index is None else t.flatten(0, 1).index_copy(0, index, rows)
    t.copy_(whole.view(t.shape))


def _slices(area: Area) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Its queries, and its keys."""
    batch = slice(None) if area.sequence is None else slice(area.sequence, area.sequence + 1)
    return (batch, slice(area.q0, area.q1)), (batch, slice(area.k0, area.k1))


def _merge_(out_BSHE: Tensor, lse_BHS: Tensor, part_BSHE: Tensor, part_lse_BHS: Tensor) -> None:
    total_BHS = torch.logaddexp(lse_BHS, part_lse_BHS)
    old, new = ((lse - total_BHS).exp_().transpose(1, 2).unsqueeze(-1) for lse in (lse_BHS, part_lse_BHS))
    out_BSHE.mul_(old).addcmul_(part_BSHE.to(out_BSHE.dtype), new)
    lse_BHS.copy_(total_BHS)
