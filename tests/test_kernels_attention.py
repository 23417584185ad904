"""Attention by blocks: each device operator against plain torch, areas against a mask made token by token. (Law 1.)"""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch

from interpreter import interpreted
from live_bytes import LiveBytes
from rowwise.kernels.attention import causal_attention, nothing_seen, see, see_backward
from rowwise.kernels.attention_block import Attended, block_backward, block_forward, plain_backward, plain_forward
from rowwise.kernels.logit_form import LogitForm
from rowwise.kernels.look import Look
from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.kernels.visible import Area, Documents, Run, tiles, visible_areas
from rowwise.parallel.sequence import runs_of
from textbook import attention

SHAPES = [(1, 1, 1, 1, 1, 2), (2, 7, 9, 6, 2, 10), (1, 33, 65, 4, 4, 64), (3, 130, 31, 3, 1, 14)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def some_documents(chance: random.Random, sequences: int, length: int) -> Documents:
    def cuts() -> tuple[int, ...]:
        count = chance.randint(0, min(6, length - 1))
        return (0, *sorted(chance.sample(range(1, length), count)))

    return Documents(tuple(cuts() for _ in range(sequences)))


FORM = LogitForm(0.4)


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
    here, reference = block_forward(q, k, v, causal, FORM), plain_forward(q, k, v, causal, FORM)
    assert here[0].dtype == dtype and here[1].dtype == reference[1].dtype
    lse = (reference[1] + more).contiguous()
    here += block_backward(d_out, Attended(q, k, v, out, lse), causal, FORM)
    reference += plain_backward(d_out, Attended(q, k, v, out, lse), causal, FORM)
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
    lse = plain_forward(q, k, v, True, FORM)[1] + 0.3
    ours = (*block_forward(q, k, v, True, FORM), *block_backward(d_out, Attended(q, k, v, out, lse), True, FORM))
    plain = (*plain_forward(q, k, v, True, FORM), *plain_backward(d_out, Attended(q, k, v, out, lse), True, FORM))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [FORM, LogitForm(0.7, 1.5)])
def test_the_plain_backward_is_the_gradient(form):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 5, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    out, lse = plain_forward(q, k, v, True, form)
    d_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), d_out)
    ours = plain_backward(d_out, Attended(*(t.detach() for t in (q, k, v, out, lse))), True, form)
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
        window = chance.choice([None, 1, 2, 3, 5, chance.randint(1, length + 3)])
        for queries in held:
            for keys in held:
                q, k = places(queries), places(keys)
                near = (q.unsqueeze(1) >= k) & (q.unsqueeze(1) - k < (window or length))
                seen = (owner[:, q].unsqueeze(2) == owner[:, k].unsqueeze(1)) & near
                found = torch.zeros_like(seen, dtype=torch.long)
                side = chance.choice([None, None, 1, 2, 7])
                for area in visible_areas(queries, keys, documents, window):
                    parts = (area,) if side is None else tuple(tiles(area, side))
                    assert side is None or max(max(part.q1 - part.q0, part.k1 - part.k0) for part in parts) <= side
                    for part in parts:
                        add(found, part)
                assert torch.equal(found, seen.long())
                everything = visible_areas(queries, keys, None, window)
                assert sum(area.pairs for area in everything) == int(near.sum())


def add(found: torch.Tensor, area: Area) -> None:
    """Counts what an area looks at."""
    block = torch.ones(area.q1 - area.q0, area.k1 - area.k0, dtype=torch.long)
    assert block.numel() and (not area.causal or block.size(0) == block.size(1))
    block = (block.triu() if area.turned else block.tril()) if area.causal else block
    found[slice(None) if area.sequence is None else area.sequence, area.q0 : area.q1, area.k0 : area.k1] += block


def outcome(attend, tensors, d_out, *given):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = attend(*leaves, *given)
    return out, *torch.autograd.grad(out, leaves, d_out)


LOOKS = [Look(window=w, cap=c) for w in (1, 2, 5, 16, 17, 40, 90) for c in (None, 1.5)] + [Look(0.3, None, 20.0)]


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_windows_and_caps_are_those_of_a_mask_and_whole_scores(monkeypatch, look):
    """Shorter and longer than documents, sequences and tiles; with `look.window` of the whole sequence or more, as with none."""
    monkeypatch.setattr("rowwise.kernels.attention.tile_side", lambda *_: 16)
    chance = random.Random(look.window)
    torch.manual_seed(look.window or 0)
    for length, kv_heads in ((1, 2), (17, 1), (40, 4), (64, 2)):
        tensors = [torch.randn(2, length, heads, 6, dtype=torch.float64) * 2 for heads in (4, kv_heads, kv_heads)]
        d_out = torch.randn_like(tensors[0])
        for documents in (None, some_documents(chance, 2, length)):
            ours = outcome(causal_attention, tensors, d_out, documents, look)
            theirs = outcome(attention, tensors, d_out, documents, look)
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
            if look.window is not None and look.window >= length:
                plain = outcome(causal_attention, tensors, d_out, documents, replace(look, window=None))
                assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(
    "look", [Look(window=w, cap=c) for w, c in ((1, None), (3, 2.0), (9, None), (30, 2.0))], ids=str
)
def test_rings_see_windows_and_caps(order, look):
    """What each rank of a ring of 4 sees of every other, put together, against one call of the whole."""
    chance, length = random.Random(order), 48
    torch.manual_seed(4)
    documents = some_documents(chance, 2, length)
    tensors = [torch.randn(2, length, heads, 6, dtype=torch.float64) for heads in (4, 2, 2)]
    d_out = torch.randn_like(tensors[0])
    whole = outcome(attention, tensors, d_out, documents, look)
    held = [runs_of(order, rank, 4, length) for rank in range(4)]
    found = [torch.zeros_like(t) for t in whole]
    for queries in held:
        mine = places(queries)
        q, (out, lse) = tensors[0][:, mine], nothing_seen(tensors[0][:, mine])
        theirs = [(places(keys), visible_areas(queries, keys, documents, look.window)) for keys in held]
        for at, areas in theirs:
            see(q, tensors[1][:, at], tensors[2][:, at], areas, out, lse, look)
        found[0][:, mine] = out
        for at, areas in theirs:
            here = [torch.zeros_like(t) for t in (q, tensors[1][:, at], tensors[2][:, at])]
            attended = Attended(q, tensors[1][:, at], tensors[2][:, at], out, lse)
            see_backward(d_out[:, mine], attended, areas, tuple(here), look)
            for total, places_of, gradient in zip(found[1:], (mine, at, at), here, strict=True):
                total[:, places_of] += gradient
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_caps_in_fewer_bits_err_by_their_rounding(dtype):
    torch.manual_seed(5)
    tensors = [(torch.randn(2, 70, heads, 8) * 2).to(dtype) for heads in (4, 2, 2)]
    d_out, look = torch.randn(2, 70, 4, 8).to(dtype), Look(window=33, cap=5.0)
    exact = outcome(attention, [t.double() for t in tensors], d_out.double(), None, look)
    for mine, right in zip(outcome(causal_attention, tensors, d_out, None, look), exact, strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)  # of sums in it, and of results
        assert (mine - right).norm() < rounding * right.norm()


def agree(dtype, size):
    """A GPU's own kernel, with tiles of 16 and rows that do not fill the last, in documents, windows and one area alone."""
    chance = random.Random(size)
    torch.manual_seed(size)
    tensors = [(torch.randn(2, 20, heads, size) * 2).to(dtype) for heads in (2, 1, 1)]
    d_out = torch.randn(2, 20, 2, size).to(dtype)
    with (
        mock.patch("rowwise.kernels.attention_packed.operator_of", lambda *_: "capped"),
        mock.patch("rowwise.kernels.attention_triton.SIDE", 16),
    ):
        for documents, window in ((None, None), (some_documents(chance, 2, 20), 7)):
            look = Look(window=window, cap=5.0)
            exact = outcome(attention, [t.double() for t in tensors], d_out.double(), documents, look)
            for mine, right in zip(outcome(causal_attention, tensors, d_out, documents, look), exact, strict=True):
                assert mine.dtype == dtype
                # Weights are rounded before products, as FlashAttention's are, and results are.
                rounding = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 2)
                assert (mine - right).norm() < rounding * right.norm(), (mine - right).norm() / right.norm()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 6), (torch.bfloat16, 20), pytest.param(torch.float16, 16, marks=pytest.mark.full)],
)
def test_triton_caps_as_torch_does(dtype, size):
    interpreted("test_kernels_attention", "agree", dtype, size)


def test_a_window_and_a_cap_take_memory_and_pairs_as_the_length_does(monkeypatch):
    """Pairs: S w less the corner. Bytes of forward and backward: those of q, k, v and their gradients, and of some tiles."""
    monkeypatch.setattr("rowwise.kernels.attention.tile_side", lambda *_: 64)
    run = (Run(0, 1, 8192),)
    assert sum(area.pairs for area in visible_areas(run, run, None, 100)) == 8192 * 100 - 100 * 99 // 2
    peaks = []
    for length in (512, 1024):
        leaves = [torch.zeros(1, length, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        with LiveBytes() as live:
            causal_attention(*leaves, None, Look(cap=5.0)).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 2.1 * peaks[0] and peaks[1] < 1024 * 1024 * 4


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
        documents, look = some_documents(chance, 3, length), Look(window=chance.choice([None, 2, 7]))
        held = [(Run(0, 1, length),)] if order == "whole" else [runs_of(order, rank, 4, length) for rank in range(4)]
        for queries in held:
            q, d_out = (torch.randn(3, length // len(held), 4, 6, dtype=torch.float64) for _ in range(2))
            found = []
            for together in (False, True):
                monkeypatch.setattr("rowwise.kernels.attention.packs", lambda *_, together=together: together)
                found.append(seen_of(queries, held, documents, q, d_out, look))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def seen_of(queries, held, documents, q, d_out, look):
    """out, lse and the gradients of these queries over all the keys."""
    out, lse = nothing_seen(q)
    blocks = []
    for i, keys in enumerate(held):
        torch.manual_seed(i)
        k, v = (torch.randn(3, q.size(1), 2, 6, dtype=torch.float64) for _ in range(2))
        blocks.append((k, v, visible_areas(queries, keys, documents, look.window)))
        see(q, k, v, blocks[-1][2], out, lse, look)
    d_q, found = torch.zeros_like(q), [out, lse]
    for k, v, areas in blocks:
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        see_backward(d_out, Attended(q, k, v, out, lse), areas, (d_q, d_k, d_v), look)
        found += [d_k, d_v]
    return [*found, d_q]


def test_a_gpu_makes_one_call_for_all_documents(monkeypatch):
    """On the meta device, where FlashAttention has shapes and no numbers: as many operators for 4 documents as for 40."""
    monkeypatch.setattr("rowwise.kernels.attention_packed.operator_of", lambda *_: "flash")
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
