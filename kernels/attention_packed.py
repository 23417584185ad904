"""Many areas of attention in one call: what a GPU needs where sequences hold many short documents.

A call for each area (`kernels.attention_block`) costs the host as much for 30 tokens as for 30,000. FlashAttention takes
areas of different lengths one behind the other instead, with the places where they begin (its *varlen* form):

    rows of queries  [area 0 | area 1 | ...]  (N, H, E)      rows of keys  [area 0 | area 1 | ...]  (M, K, E)

so a layer makes one call, or two where areas of both kinds lie side by side. Areas of one call have no query in common, and are
all causal or none; turned ones are gathered from the last row to the first. Rows that already lie so are used as they are; others
are gathered by an index that is made once a batch for all layers, on the host, and copied without waiting.

Shapes: N queries and M keys over all areas, H heads, K key heads, E head dim, lse (H, N).
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from rowwise.kernels import torch_attention
from rowwise.kernels.attention_block import Attended, Gradients, block_backward, block_forward, operator_of
from rowwise.kernels.logit_form import LogitForm
from rowwise.kernels.visible import Area


@dataclass(frozen=True, eq=False)
class Packing:
    """Areas that one call looks at. `queries` (N,) and `keys` (M,) are their rows in (B S) and (B T) flattened, None for all
    in order; `q_begins`, `k_begins` (areas + 1,) int32 are where each begins, on the device, and `q_lengths`, `k_lengths`
    how long it is, on the host."""

    causal: bool
    queries: Tensor | None
    keys: Tensor | None
    q_begins: Tensor
    k_begins: Tensor
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]


def packs(q: Tensor, areas: Sequence[Area], form: LogitForm) -> bool:
    """Says whether these areas are better looked at together: there are several, and the operator takes them so, or takes none
    otherwise."""
    operator = operator_of(q, form)
    return operator == "capped" or (operator == "flash" and len(areas) > 1)


@functools.lru_cache(maxsize=64)  # the layers of a model ask for the same
def packings(
    areas: tuple[Area, ...], sequences: int, q_length: int, k_length: int, device: torch.device
) -> list[Packing]:
    """Returns the calls that look at `areas`, each at as many as it can, of (sequences, q_length) queries and (sequences, k_length)
    keys."""
    flat = [
        area._replace(
            q0=i * q_length + area.q0, q1=i * q_length + area.q1, k0=i * k_length + area.k0, k1=i * k_length + area.k1
        )
        for area in areas
        for i in (range(sequences) if area.sequence is None else (area.sequence,))
    ]
    return [
        Packing(
            causal=group[0].causal,
            queries=_index([_stretch(a.q0, a.q1, a.turned) for a in group], sequences * q_length, device),
            keys=_index([_stretch(a.k0, a.k1, a.turned) for a in group], sequences * k_length, device),
            q_begins=_begins([a.q1 - a.q0 for a in group], device),
            k_begins=_begins([a.k1 - a.k0 for a in group], device),
            q_lengths=tuple(a.q1 - a.q0 for a in group),
            k_lengths=tuple(a.k1 - a.k0 for a in group),
        )
        for group in disjoint_groups(flat)
    ]


def disjoint_groups(areas: Iterable[Area]) -> list[list[Area]]:
    """Groups areas of one kind that have no query in common, in as few groups as one pass over them finds; the places of all are
    counted in one row."""
    groups: list[list[Area]] = []
    for area in sorted(areas, key=lambda area: (area.causal, area.q0)):
        for group in groups:
            if group[0].causal == area.causal and group[-1].q1 <= area.q0:
                group.append(area)
                break
        else:
            groups.append([area])
    return groups


def packed_forward(q: Tensor, k: Tensor, v: Tensor, packing: Packing, form: LogitForm) -> tuple[Tensor, Tensor]:
    """Computes out (N, H, E) in the dtype of `q`, and lse (H, N) in float32 (float64 for float64), of gathered rows."""
    operator = operator_of(q, form)
    if operator == "capped":
        from rowwise.kernels.attention_triton import attend_triton

        return attend_triton(q, k, v, packing, form)
    if operator != "flash":
        parts = [block_forward(a, b, c, packing.causal, form) for a, b, c in _each(packing, (q,), (k, v))]
        outs, lses = zip(*parts, strict=True)
        return torch.cat([out[0] for out in outs]), torch.cat([lse[0] for lse in lses], dim=1)
    size = q.size(-1)
    out, lse, *_ = torch_attention.packed_flash_forward(
        *map(_filled, (q, k, v)), *_shape(packing), 0.0, packing.causal, False, scale=form.scale
    )
    return out[..., :size], lse


def packed_backward(d_out: Tensor, attended: Attended, packing: Packing, form: LogitForm) -> Gradients:
    """Returns what these areas give of the gradients, of gathered rows."""
    q, k, v, out, lse = attended
    operator = operator_of(q, form)
    if operator == "capped":
        from rowwise.kernels.attention_triton import attend_backward_triton

        return attend_backward_triton(d_out, attended, packing, form)
    if operator != "flash":
        lses = [part.contiguous().unsqueeze(0) for part in lse.split(packing.q_lengths, dim=1)]
        parts = _each(packing, (d_out, q, out), (k, v))
        found = [
            block_backward(d, Attended(a, b, c, o, part_lse), packing.causal, form)
            for (d, a, o, b, c), part_lse in zip(parts, lses, strict=True)
        ]
        d_q, d_k, d_v = (torch.cat([gradient[0] for gradient in of_one]) for of_one in zip(*found, strict=True))
        return d_q, d_k, d_v
    size = q.size(-1)
    seed, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 1))  # of dropout: there is none
    gradients = torch_attention.packed_flash_backward(
        *map(_filled, (d_out, q, k, v, out)), lse.contiguous(), *_shape(packing), 0.0, packing.causal, seed, unused,
        scale=form.scale,
    )  # fmt: skip
    d_q, d_k, d_v = (gradient[..., :size] for gradient in gradients)
    return d_q, d_k, d_v


def taken(t: Tensor, index: Tensor | None) -> Tensor:
    """Returns the rows of (B, S, ...) at `index`, (N, ...); None for all."""
    flat = t.flatten(0, 1)
    return flat if index is None else flat.index_select(0, index)


def _shape(packing: Packing) -> tuple[Tensor, Tensor, int, int]:
    return packing.q_begins, packing.k_begins, max(packing.q_lengths), max(packing.k_lengths)


def _filled(t: Tensor) -> Tensor:
    """With heads of a multiple of 8, which is what FlashAttention takes: zeros behind change no score."""
    return F.pad(t, (0, -t.size(-1) % 8)) if t.size(-1) % 8 else t.contiguous()


def _each(packing: Packing, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The areas one by one, (1, rows, heads, E): for devices that have nothing better."""
    split = [t.split(packing.q_lengths) for t in of_queries] + [t.split(packing.k_lengths) for t in of_keys]
    return [tuple(t.unsqueeze(0) for t in part) for part in zip(*split, strict=True)]


def _begins(lengths: list[int], device: torch.device) -> Tensor:
    return _on(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def _stretch(begin: int, end: int, turned: bool) -> range:
    return range(end - 1, begin - 1, -1) if turned else range(begin, end)


def _index(stretches: list[range], total: int, device: torch.device) -> Tensor | None:
    """The rows of these stretches, one behind the other; None where they are all rows in order."""
    joined = (*(rows.start for rows in stretches), total) == (0, *(rows.stop for rows in stretches))
    if joined and all(rows.step == 1 for rows in stretches):
        return None
    return _on(torch.cat([torch.arange(rows.start, rows.stop, rows.step) for rows in stretches]), device)


def _on(t: Tensor, device: torch.device) -> Tensor:
    """Copied without a wait of the host."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
