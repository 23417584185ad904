"""Law 2 for sequences that ranks share: Ulysses, rings in every order, and both, equal one process."""

import functools
from pathlib import Path

import pytest

from parity import Trace, assert_all_same, run_plain, run_together, small_config, with_layout

# ulysses, ring, order: two and four ranks
SHARES = [
    (2, 1, None), (1, 2, "contiguous"), (1, 2, "zigzag"), (1, 2, "striped"),
    (4, 1, None), (1, 4, "contiguous"), (1, 4, "zigzag"), (1, 4, "striped"),
    (2, 2, "contiguous"), (2, 2, "zigzag"), (2, 2, "striped"),
]  # fmt: skip
KV_HEADS = (1, 2, 4)
# 32 tokens are shared evenly by all; 29 are not, and are padded; 3 leave some ranks nothing but padding.
LENGTHS = (32, 29, 3)
STEPS = 2  # the second sees that the update of the first arrived; a third would see no more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sequence")


def sequence_config(folder: Path, kv_heads: int, length: int, *overrides: str):
    """Documents that begin anywhere, unequal valid tokens, and clipping; a rank has one micro-batch, unless `overrides` say more."""
    return small_config(
        folder, "model.layers=1", "model.dim=12", "model.heads=4", f"model.kv_heads={kv_heads}", "model.head_dim=6", "model.ffn_dim=9",
        "batch.global_size=4", "batch.micro_size=4", f"batch.seq_len={length}", *overrides,
    )  # fmt: skip


@functools.cache
def reference(folder: Path, steps: int, *case) -> Trace:
    return run_plain(sequence_config(folder, *case), steps)


def assert_law(ranks, folder: Path, cases: list[tuple[int, dict, tuple]], steps: int = STEPS) -> None:
    """Each case: how many ranks, their layout, and (key heads, length, overrides)."""
    laid = [with_layout(sequence_config(folder, *case), world, **layout) for world, layout, case in cases]
    for number, traces in run_together(ranks, dict(enumerate(laid)), steps).items():
        assert_all_same(traces, reference(folder, steps, *cases[number][2]))


# By default each share is at one stage, and each number of ranks and each order at both.
AT_ZERO = [(share, 3 * ((number + number // 4) % 2)) for number, share in enumerate(SHARES)]
STAGES = [
    pytest.param(*share, zero, marks=[] if (share, zero) in AT_ZERO else pytest.mark.full)
    for share in SHARES
    for zero in (0, 3)
]
WITHOUT = "data.mask_documents=false"


def by_default(ulysses: int, ring: int, number: int) -> list[tuple]:
    """Padded tokens and whole sequences, one of them without documents, or, in turns, ranks that have nothing but padding. Where
    heads are exchanged there are fewer key heads than ranks, as many, and more."""
    first, second = [(1, 4), (2, 1), (4, 2)][number % 3] if ulysses > 1 else (2, 1)
    if number % 2:
        return [(first, 29), (second, 3)]
    cases = [(first, 32), (second, 29, WITHOUT)] if number % 4 else [(first, 29), (second, 32, WITHOUT)]
    return [*cases, (4, 3)] if ulysses == 4 else cases


@pytest.mark.parametrize(("ulysses", "ring", "order", "zero"), STAGES)
def test_steps_equal_those_of_one_process(ranks, folder, ulysses, ring, order, zero, full):
    """And, of whole sequences without documents, the same."""
    everything = [(kv_heads, length) for kv_heads in KV_HEADS for length in LENGTHS]
    layout = {"ulysses": ulysses, "ring": ring, "ring_order": order, "zero": zero}
    cases = [*everything, (2, 29, WITHOUT)] if full else by_default(ulysses, ring, SHARES.index((ulysses, ring, order)))
    assert_law(ranks, folder, [(ulysses * ring, layout, case) for case in cases])


# Windows shorter and longer than a rank's tokens, and than documents; layers with and without; capped scores.
LOOKS = (
    "model.layers=2",
    "model.window=5",
    "model.window_layers=[true,false]",
    "model.attention_cap=2",
    "model.attention_scale=0.7",
)
WINDOWS = [(2, 1, None, 0), (1, 2, "zigzag", 3), (1, 4, "striped", 0), (2, 2, "contiguous", 3)]


@pytest.mark.parametrize(("ulysses", "ring", "order", "zero"), WINDOWS)
def test_windows_and_caps_are_those_of_one_process(ranks, folder, ulysses, ring, order, zero, full):
    layout = {"ulysses": ulysses, "ring": ring, "ring_order": order, "zero": zero}
    cases = [(4, 29, *LOOKS)]
    if full or ulysses == 1:  # where windows reach beyond what a rank has
        cases.append((2, 32, "model.window=20", WITHOUT))
    assert_law(ranks, folder, [(ulysses * ring, layout, case) for case in cases])


def test_windows_and_caps_under_a_pipeline(ranks, folder):
    """Whose layers have other windows than their stage's first, and whose backward is in two."""
    layout = {
        "pipeline": 2,
        "pipeline_schedule": "zb_v",
        "virtual_stages": 2,
        "ring": 2,
        "ring_order": "striped",
        "zero": 3,
    }
    case = (2, 29, *LOOKS[1:], "model.layers=4", "batch.global_size=3", "batch.micro_size=1")
    assert_law(ranks, folder, [(4, layout, case)])


def test_every_kind_of_rank_at_once(ranks, folder, full):
    """Replicas, shards and sharers of sequences, where ZeRO splits everything, and gradients alone."""
    layout = {"replicate": 2, "shard": 2, "ring": 2}
    cases = [(8, layout | {"zero": zero}, (2, 29, "batch.micro_size=1")) for zero in ((0, 1, 3) if full else (3,))]
    both = (8, {"replicate": 1, "shard": 2, "ring": 2, "ulysses": 2, "zero": 2}, (1, 29, "batch.micro_size=1"))
    assert_law(ranks, folder, [*cases, both])


PIPELINES = [
    ("1f1b", 1, 2, 1, None),
    ("zb_h1", 1, 1, 2, "contiguous"),
    ("zb_h2", 1, 1, 2, "striped"),
    ("zb_v", 2, 1, 2, "zigzag"),
    ("interleaved_1f1b", 2, 1, 2, "striped"),
    ("blockwise", 2, 2, 2, "zigzag"),
    ("1f1b", 1, 4, 1, None),
    ("zb_h2", 1, 1, 4, "striped"),
]
ON_EIGHT = PIPELINES[-2:]  # under stages a share of four is what it is without, as a share of two is


@pytest.mark.parametrize(
    ("schedule", "chunks", "ulysses", "ring", "order", "zero"),
    [
        pytest.param(*case, zero, marks=[] if (number + zero) % 2 and case not in ON_EIGHT else pytest.mark.full)
        for number, case in enumerate(PIPELINES)
        for zero in (0, 3)
    ],
)
def test_under_a_pipeline(ranks, folder, schedule, chunks, ulysses, ring, order, zero):
    layout = {"pipeline": 2, "pipeline_schedule": schedule, "virtual_stages": chunks, "zero": zero}
    layout |= {"ulysses": ulysses, "ring": ring, "ring_order": order}
    model = ("model.tie_embeddings=true", "model.stable_embedding=true", f"model.layers={2 * chunks}")
    case = (2, 29, *model, "batch.global_size=3", "batch.micro_size=1")
    assert_law(ranks, folder, [(2 * ulysses * ring, layout, case)])


def test_rules_that_exchange_messages_and_8_bit_states(ranks, folder, full):
    """States are laid over the ranks that share sequences as over any others."""
    low = ("optim.rank=4", "optim.refresh_every=1")  # a basis for each step
    rules = {"adamw8bit": (), "fira": low, "muon": ()}
    if full:
        rules |= {"dct": low, "adafactor": ()}  # otherwise under a pipeline
    layout = {"ulysses": 2, "ring": 2, "zero": 2}
    cases = [(4, layout, (2, 29, f"optim={rule}", *options)) for rule, options in rules.items()]
    assert_law(ranks, folder, cases)
