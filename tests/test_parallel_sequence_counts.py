"""What sharing sequences costs and saves, counted on real ranks: scores computed, bytes sent, activations held. (Law 4.)"""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from live_bytes import LiveBytes
from messages import Messages
from parity import engine_on, small_config, with_layout
from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.kernels.visible import Documents
from rowwise.parallel.config import RING_ORDER
from rowwise.parallel.mesh import make_mesh
from rowwise.parallel.sequence import SequenceAttention, padded_length, positions_of, runs_of
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.loss import summed_loss

HEADS, SIZE = 4, 8
ORDERS: tuple[RING_ORDER, ...] = ("contiguous", "zigzag", "striped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sequence-counts")


class Scores(TorchDispatchMode):
    """While entered, counts the pairs of query and key, times heads and sequences, that forward operators compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            (B, H, S, _), T, causal = args[0].shape, args[1].size(2), args[4:5] == (True,)
            self.count += B * H * (S * (S + 1) // 2 if causal else S * T)
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    length: int
    kv_heads: int = HEADS
    heads: int = HEADS
    order: RING_ORDER = "zigzag"
    documents: Documents | None = None


@dataclass(frozen=True)
class Counts:
    """Of one attention: scores computed in the forward; messages and bytes sent, backward included."""

    scores: int
    calls: Counter[str]
    bytes: Counter[str]


def attend(workers, config, cases: list[Case]) -> list[Counts]:
    mesh = make_mesh(config.parallel, workers)
    return [count(mesh.sequence, case) for case in cases]


def count(axes, case: Case) -> Counts:
    axes = replace(axes, order=case.order)
    here = len(positions_of(axes, case.length))
    q, k, v = (
        torch.randn(2, here, heads, SIZE, requires_grad=True) for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    with Messages() as messages, Scores() as scores:
        SequenceAttention(axes)(q, k, v, case.documents).sum().backward()
    return Counts(scores.count, messages.calls, messages.bytes)


def on(ranks, folder, world: int, cases: list[Case], **degrees) -> list[tuple[Counts, ...]]:
    """For each case, what each rank counted."""
    config = small_config(folder, f"model.heads={cases[0].heads}", "model.kv_heads=1", "model.head_dim=8")
    counted = ranks.run(attend, world, with_layout(config, world, **degrees), cases)
    return list(zip(*counted, strict=True))


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_zigzag_and_striped_orders_share_the_work_evenly(ranks, folder, ring):
    length, chunk = 256, 256 // ring
    cases = [Case(length, order=order) for order in ORDERS]
    for case, counts in zip(cases, on(ranks, folder, ring, cases, ring=ring), strict=True):
        scores = [rank.scores for rank in counts]
        assert sum(scores) == 2 * HEADS * length * (length + 1) // 2, "something is computed twice, or not seen"
        imbalance = max(scores) / (sum(scores) / ring)
        if case.order == "contiguous":  # the last rank sees all chunks before its own, and half of that
            theory = (chunk * (chunk + 1) / 2 + (ring - 1) * chunk**2) / (length * (length + 1) / 2 / ring)
            assert imbalance == pytest.approx(theory) and theory > 1.95 - 1 / ring
        else:
            assert imbalance < 1.05


def test_nothing_of_another_document_is_computed(ranks, folder):
    chance, length = random.Random(3), 64
    begins = tuple((0, *sorted(chance.sample(range(1, length), count))) for count in (3, 9))
    sizes = [b - a for row in begins for a, b in pairwise((*row, length))]
    cases = [Case(length, order=order, documents=Documents(begins)) for order in ORDERS]
    for degrees in ({"ring": 4}, {"ulysses": 2, "ring": 2}, {"ulysses": 4}):
        for counts in on(ranks, folder, 4, cases, **degrees):
            assert sum(rank.scores for rank in counts) == HEADS * sum(n * (n + 1) // 2 for n in sizes)


def test_ulysses_sends_what_its_formula_says_and_no_more_for_longer_sequences(ranks, folder):
    sent = {}
    grid = {
        2: [Case(64), Case(64, kv_heads=1)],
        3: [Case(60, heads=6, kv_heads=2)],
        4: [Case(128), Case(64, kv_heads=1)],
    }
    for ulysses, cases in grid.items():
        for case, counts in zip(cases, on(ranks, folder, ulysses, cases, ulysses=ulysses), strict=True):
            key_heads = math.lcm(case.kv_heads, ulysses)  # each rank has those that its query heads look at
            expected = 2 * (2 * case.length // ulysses) * (2 * case.heads + 2 * key_heads) * SIZE * 4
            for rank in counts:
                assert rank.calls == Counter(alltoall_base_=4)  # there and back, and both in the backward
                assert rank.bytes["alltoall_base_"] == expected
            sent[ulysses, case] = expected
    assert sent[4, Case(128)] == sent[2, Case(64)] > 0, "length and degree doubled together: the volume is not the same"


@pytest.mark.parametrize("ring", [2, 4])
def test_a_ring_sends_keys_and_values_once_round_and_their_gradients_home(ranks, folder, ring):
    cases, times = [Case(64, kv_heads=1), Case(64), Case(128)], 2 * (ring - 1) + ring
    for case, counts in zip(cases, on(ranks, folder, ring, cases, ring=ring), strict=True):
        block = 2 * 2 * case.length // ring * case.kv_heads * SIZE * 4
        for rank in counts:
            assert rank.calls == Counter(send=times, recv_=times)
            assert rank.bytes["send"] == times * block


def peaks(workers, config, lengths: list[int]) -> list[int]:
    """For each length, the most bytes that the forward and backward of one micro-batch made and held."""
    mesh = make_mesh(config.parallel, workers)
    model = engine_on(mesh, config).model
    return [peak(model, mesh.sequence, length) for length in lengths]


def peak(model, axes, length: int) -> int:
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, length))
    batch = MicroBatch(tokens, tokens, torch.arange(length).expand_as(tokens), None)
    if axes is not None:
        batch = batch.at(positions_of(axes, length))
    with LiveBytes() as live:
        summed_loss(model, batch).total.backward()
    return live.peak


def test_activations_fall_with_the_number_of_ranks(ranks, folder, full):
    """Each rank holds its share; with Ulysses of what is seen twice, as attention's heads gave it and as the tokens have it."""
    config = small_config(
        folder, "precision=fp32", "model.layers=2", "model.heads=8", "model.kv_heads=4", "model.dim=64", "model.ffn_dim=128",
        "model.head_dim=8", "parallel.zero=0",
    )  # fmt: skip
    lengths = [256, 512]
    (alone,) = ranks.run(peaks, 1, with_layout(config, 1), lengths)
    for degrees in ({"ulysses": 2}, {"ring": 4}, {"ulysses": 2, "ring": 2}, *[{"ulysses": 4}, {"ring": 2}] * full):
        world = degrees.get("ulysses", 1) * degrees.get("ring", 1)
        for rank in ranks.run(peaks, world, with_layout(config, world, **degrees), lengths):
            for part, whole, length in zip(rank, alone, lengths, strict=True):
                seen = config.model.layers * 2 * length * config.model.dim * 4 if "ulysses" in degrees else 0
                assert 1 <= part * world / (whole + seen) <= 1.002, degrees


def peaks_of_exchanges(workers, times: int) -> set[int]:
    """Bytes at the height of a few exchanges whose tensors are dropped at once, each time."""
    dist.init_process_group("gloo", store=workers.store, rank=workers.rank, world_size=workers.world_size)
    found = set()
    for _ in range(times):
        with LiveBytes() as live:
            for _ in range(20):
                sent, came = torch.randn(64), torch.empty(64)
                dist.all_to_all_single(came, sent)
                del sent
                twice = came * 2
                del came, twice
        found.add(live.peak)
    return found


def test_what_is_held_does_not_depend_on_when_gloo_lets_go(ranks):
    """Its thread keeps what was sent for a moment after it has come."""
    assert ranks.run(peaks_of_exchanges, 2, 50) == [{2 * 64 * 4}] * 2


def test_every_place_is_held_once_and_padding_comes_last():
    for order in ("contiguous", "zigzag", "striped"):
        for ring in (1, 2, 3, 4):
            for ulysses in (1, 2, 3, 4):
                for length in (1, 5, 24, 29):
                    padded = padded_length(length, order, ring, ulysses)
                    assert length <= padded < length + 2 * ring * ulysses and padded % (ring * ulysses) == 0
                    runs = [runs_of(order, rank, ring, padded) for rank in range(ring)]
                    assert len({sum(run.length for run in own) for own in runs}) == 1
                    held = sorted(run.start + run.stride * n for own in runs for run in own for n in range(run.length))
                    assert held == list(range(padded))
                    assert all(sum(run.length for run in own) % ulysses == 0 for own in runs)
