"""Attention by blocks: each device operator against plain torch, areas against a mask made token by token. (Law 1.)"""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

from rowwise.kernels.attention import causal_attention, nothing_seen, see, see_backward
from rowwise.kernels.attention_block import Attended, block_backward, block_forward, plain_backward, plain_forward
from rowwise.kernels.look import PLAINLY
from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.kernels.visible import Documents, Run, visible_areas
from rowwise.parallel.sequence import runs_of
from textbook import attention

SHAPES = [(1, 1, 1, 1, 1, 2), (2, 7, 9, 6, 2, 10), (1, 33, 65, 4, 4, 64), (3, 130, 31, 3, 1, 14)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def some_documents(chance: random.Random, sequences: int, length: int) -> Documents:
    def cuts() -> tuple[int, ...]:
        count = chance.randint(0, min(6, length - 1))
        return (0, *sorted(chance.sample(range(1, length), count)))

    return Documents(tuple(cuts() for _ in range(sequences)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operator_is_the_formula(shape, dtype, causal):
    torch.manual_seed(sum(shape))
    B, S, T, H, K, E = shape
    q, k, v = (
        torch.randn(B, n, heads, E).to(dtype) for n, heads in ((S, H), (S if causal else T, K), (S if causal else T, K))
    )
    # Of more keys than this block's: that is how blocks of a ring meet it.
    d_out, out, more = torch.randn_like(q), torch.randn_like(q), 0.3
    here, reference = block_forward(q, k, v, causal, 0.4), plain_forward(q, k, v, causal, 0.4)
    assert here[0].dtype == dtype and here[1].dtype == reference[1].dtype
    lse = (reference[1] + more).contiguous()
    here += block_backward(d_out, Attended(q, k, v, out, lse), causal, 0.4)
    reference += plain_backward(d_out, Attended(q, k, v, out, lse), causal, 0.4)
    for ours, theirs in zip(here, reference, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_may_lie_in_any_order(dtype):
    """As what a condensed layer makes, laid out by features, and a gradient that is one number for all."""
    torch.manual_seed(2)
    q, k, v, out = (torch.randn(2, heads, 8, 7).to(dtype).permute(0, 3, 1, 2) for heads in (4, 2, 2, 4))
    d_out = torch.ones((), dtype=dtype).expand_as(out)
    assert all(t.stride(-1) != 1 for t in (q, k, v, out, d_out))
    lse = plain_forward(q, k, v, True, 0.4)[1] + 0.3
    ours = (*block_forward(q, k, v, True, 0.4), *block_backward(d_out, Attended(q, k, v, out, lse), True, 0.4))
    plain = (*plain_forward(q, k, v, True, 0.4), *plain_backward(d_out, Attended(q, k, v, out, lse), True, 0.4))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_plain_backward_is_the_gradient():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 5, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    out, lse = plain_forward(q, k, v, True, 0.4)
    d_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), d_out)
    ours = plain_backward(d_out, Attended(*(t.detach() for t in (q, k, v, out, lse))), True, 0.4)
    for gradient, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-12, atol=1e-14)


def places(runs: tuple[Run, ...]) -> torch.Tensor:
    return torch.cat([run.start + run.stride * torch.arange(run.length) for run in runs])


def layouts(chance: random.Random, length: int) -> tuple[tuple[Run, ...], ...]:
    """All tokens of a sequence as ranks may have them: in chunks of any size, in twos or one by one, or every n-th."""
    if chance.random() < 0.5:
        stride = chance.randint(1, 5)
        return tuple((Run(rank, stride, len(range(rank, length, stride))),) for rank in range(min(stride, length)))
    ends = (0, *sorted(chance.sample(range(1, length), min(length - 1, 5))), length)
    chunks = [Run(a, 1, b - a) for a, b in pairwise(ends)]
    half = len(chunks) // 2
    return tuple((a, b) for a, b in zip(chunks[:half], chunks[::-1], strict=False)) or ((chunks[0],),)


def test_areas_are_what_is_seen_each_pair_once():
    chance = random.Random(5)
    for _ in range(300):
        length = chance.randint(1, 40)
        documents = some_documents(chance, 2, length)
        owner = torch.stack([sum((torch.arange(length) >= b).long() for b in row) for row in documents.begins])
        held = layouts(chance, length)
        for queries in held:
            for keys in held:
                q, k = places(queries), places(keys)
                seen = (owner[:, q].unsqueeze(2) == owner[:, k].unsqueeze(1)) & (q.unsqueeze(1) >= k)
                found = torch.zeros_like(seen, dtype=torch.long)
                for sequence, q0, q1, k0, k1, causal in visible_areas(queries, keys, documents):
                    block = torch.ones(q1 - q0, k1 - k0, dtype=torch.long)
                    assert block.numel() and (not causal or block.size(0) == block.size(1))
                    found[slice(None) if sequence is None else sequence, q0:q1, k0:k1] += (
                        block.tril() if causal else block
                    )
                assert torch.equal(found, seen.long())
                everything = visible_areas(queries, keys)
                assert sum(area.pairs for area in everything) == int((q.unsqueeze(1) >= k).sum())


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_packed_documents_are_attended_each_alone(kv_heads):
    chance = random.Random(kv_heads)
    torch.manual_seed(kv_heads)
    for length in (1, 2, 17, 64):
        documents = some_documents(chance, 3, length)
        tensors = [torch.randn(3, length, heads, 10, dtype=torch.float64) for heads in (6, kv_heads, kv_heads)]
        d_out = torch.randn_like(tensors[0])
        results = []
        for attend in (causal_attention, attention):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = attend(*leaves, documents)
            results.append((out, *torch.autograd.grad(out, leaves, d_out)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", ["whole", "contiguous", "zigzag", "striped"])
def test_areas_looked_at_together_are_what_they_are_one_by_one(monkeypatch, order):
    """On the CPU the call for many areas is made of calls for each; how rows come to it and go back is a GPU's."""
    chance = random.Random(order)
    torch.manual_seed(3)
    for length in (8, 24, 96):
        documents = some_documents(chance, 3, length)
        held = [(Run(0, 1, length),)] if order == "whole" else [runs_of(order, rank, 4, length) for rank in range(4)]
        for queries in held:
            q, d_out = (torch.randn(3, length // len(held), 4, 6, dtype=torch.float64) for _ in range(2))
            found = []
            for together in (False, True):
                monkeypatch.setattr("rowwise.kernels.attention.packs", lambda q, areas, together=together: together)
                found.append(seen_of(queries, held, documents, q, d_out))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def seen_of(queries, held, documents, q, d_out):
    """out, lse and the gradients of these queries over all the keys."""
    out, lse = nothing_seen(q)
    blocks = []
    for i, keys in enumerate(held):
        torch.manual_seed(i)
        k, v = (torch.randn(3, q.size(1), 2, 6, dtype=torch.float64) for _ in range(2))
        blocks.append((k, v, visible_areas(queries, keys, documents)))
        see(q, k, v, blocks[-1][2], out, lse, PLAINLY)
    d_q, found = torch.zeros_like(q), [out, lse]
    for k, v, areas in blocks:
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        see_backward(d_out, Attended(q, k, v, out, lse), areas, (d_q, d_k, d_v), PLAINLY)
        found += [d_k, d_v]
    return [*found, d_q]


def test_a_gpu_makes_one_call_for_all_documents(monkeypatch):
    """On the meta device, where FlashAttention has shapes and no numbers: as many operators for 4 documents as for 40."""
    monkeypatch.setattr("rowwise.kernels.attention_packed.operator_of", lambda q: "flash")
    counted = []
    for documents in (4, 40):
        begins = (0, *sorted(random.Random(1).sample(range(1, 100), documents - 1)))
        q, k, v = (torch.zeros(2, 100, heads, 12, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        packed = Documents((begins, begins[: documents // 2]))
        with Operators() as operators:
            out = causal_attention(*leaves, packed)
            torch.autograd.grad(out, leaves, torch.empty_like(out))
        counted.append(operators.calls)
    assert counted[0] == counted[1]
    assert counted[0]["aten._flash_attention_forward"] == counted[0]["aten._flash_attention_backward"] == 1


class Operators(TorchDispatchMode):
    """While entered, counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))
