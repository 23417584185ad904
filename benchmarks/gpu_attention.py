"""Attention block by block on one device: right, as all ranks of a ring one after the other, and fast."""

import itertools
import time
from typing import Any, get_args

import torch
import torch.nn.functional as F
from gpu_place import Place
from torch import Tensor

from rowwise.kernels.attention import causal_attention, nothing_seen, see, see_backward
from rowwise.kernels.attention_block import Attended, plain_backward, plain_forward
from rowwise.kernels.look import PLAINLY, Look
from rowwise.kernels.visible import Documents, Run, visible_areas
from rowwise.parallel.config import RING_ORDER
from rowwise.parallel.sequence import runs_of

RING = 4
# (heads, key heads, head size); FlashAttention's sizes are multiples of 8, and others are filled up with zeros.
HEADS = [(4, 4, 64), (8, 2, 128), (6, 3, 20)]
LOOKS = (PLAINLY, Look(cap=5.0))  # by torch's operators, and by the kernel of our own
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def check_attention(place: Place) -> dict[str, Any]:
    """Every operator, dtype and order against plain torch in float64 on the CPU; the largest difference over the largest
    entry, of the output and the three gradients."""
    worst: dict[str, float] = {}
    length = 64 if place.rehearsal else 1024
    packed = Documents(((0, 3, length // 2 - 12, length * 3 // 4 + 9), (0,)))
    for dtype, (heads, key_heads, size), look in itertools.product(TOLERANCE, HEADS, LOOKS):
        q, k, v = (torch.randn(2, length, n, size).to(dtype) for n in (heads, key_heads, key_heads))
        d_out = torch.randn_like(q)
        for documents in (None, packed):
            expected = by_documents(q.double(), k.double(), v.double(), d_out.double(), documents, look)
            here = [t.to(place.device) for t in (q, k, v, d_out)]
            found = {order: around_a_ring(*here, order, documents, look) for order in get_args(RING_ORDER)}
            found["whole"] = whole(*here, documents, look)
            for name, results in found.items():
                key = f"{str(dtype).removeprefix('torch.')}, {name}{'' if look.cap is None else ', capped'}"
                worst[key] = max(worst.get(key, 0.0), *map(relative, results, expected))
    passed = all(worst[key] <= TOLERANCE[getattr(torch, key.split(",")[0])] for key in worst)
    return {"largest_relative_difference": worst, "passed": passed}


def by_documents(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, documents: Documents | None, look: Look
) -> list[Tensor]:
    """out, dq, dk, dv, each document by itself."""
    results = [torch.zeros_like(t) for t in (q, q, k, v)]
    for row in range(len(q)):
        begins = (0,) if documents is None else documents.begins[row]
        for begin, end in itertools.pairwise((*begins, q.size(1))):
            part = [t[row : row + 1, begin:end] for t in (q, k, v, d_out)]
            out, lse = plain_forward(*part[:3], True, look.form(q.size(-1)))
            gradients = plain_backward(part[3], Attended(*part[:3], out, lse), True, look.form(q.size(-1)))
            for total, piece in zip(results, (out, *gradients), strict=True):
                total[row : row + 1, begin:end] = piece
    return results


def around_a_ring(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, order: RING_ORDER, documents: Documents | None, look: Look
) -> list[Tensor]:
    """out, dq, dk, dv, as RING ranks would have computed them."""
    runs = [runs_of(order, rank, RING, q.size(1)) for rank in range(RING)]
    held = [positions(own).to(q.device) for own in runs]
    results = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (q, q, k, v)]
    for rank, mine in enumerate(held):
        q_here, d_out_here = q[:, mine], d_out[:, mine]
        out, lse = nothing_seen(q_here)
        areas = [visible_areas(runs[rank], keys, documents) for keys in runs]
        for theirs, seen in zip(held, areas, strict=True):
            see(q_here, k[:, theirs], v[:, theirs], seen, out, lse, look)
        d_q = torch.zeros_like(out)
        for theirs, seen in zip(held, areas, strict=True):
            d_k, d_v = (results[i][:, theirs] for i in (2, 3))
            attended = Attended(q_here, k[:, theirs], v[:, theirs], out.to(q.dtype), lse)
            see_backward(d_out_here, attended, seen, (d_q, d_k, d_v), look)
            results[2][:, theirs], results[3][:, theirs] = d_k, d_v
        results[0][:, mine], results[1][:, mine] = out, d_q
    return results


def positions(runs: tuple[Run, ...]) -> Tensor:
    return torch.cat([run.start + run.stride * torch.arange(run.length) for run in runs])


def whole(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, documents: Documents | None, look: Look) -> list[Tensor]:
    """out, dq, dk, dv of what one rank calls."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = causal_attention(*leaves, documents, look)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.cpu().double() - reference).abs().max() / reference.abs().max())


def time_attention(place: Place) -> dict[str, Any]:
    """Seconds of forward and backward in bfloat16, 16 heads of 128: torch's causal attention, our own of capped scores, and that of
    packed documents of 1,024 tokens each."""
    found = {}
    every, size, lengths = (32, 8, (64,)) if place.rehearsal else (1024, 128, (4096, 16384))
    for length in lengths:
        shape = (1, length, 16, size)
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=place.device, requires_grad=True) for _ in range(3))
        documents = Documents((tuple(range(0, length, every)),))
        found[str(length)] = {
            "causal": seconds_of(lambda q=q, k=k, v=v: causal_attention(q, k, v), place),
            "capped": seconds_of(lambda q=q, k=k, v=v: causal_attention(q, k, v, None, Look(cap=50.0)), place),
            "packed": seconds_of(lambda q=q, k=k, v=v, d=documents: causal_attention(q, k, v, d), place),
            "by_documents_as_a_batch": seconds_of(
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                    *(t.view(-1, every, 16, size).transpose(1, 2) for t in (q, k, v)), is_causal=True
                ),
                place,
            ),
        }
    return {"passed": True, "seconds": found}


def seconds_of(forward, place: Place, repeats: int = 10) -> float:
    for repeat in range(repeats + 3):
        if repeat == 3:
            place.wait()
            began = time.perf_counter()
        forward().sum().backward()
    place.wait()
    return (time.perf_counter() - began) / repeats
