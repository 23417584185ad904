"""Law 2 for pipelines: every schedule, cut, ZeRO stage and number of micro-batches equals one process.

`pytest --full tests/test_parallel_pipeline.py` takes the whole product of cases."""

import functools
from pathlib import Path

import pytest

from parity import Trace, assert_all_same, run_layouts, run_plain, small_config, with_layout

SCHEDULES = [
    ("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1), ("zb_h2", 1), ("zb_v", 2),
    ("blockwise", 1), ("blockwise", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@functools.cache
def pipeline_config(folder: Path, layers: int, micro_batches: int, tied: bool, *overrides: str):
    """As many layers as stages; documents, unequal valid tokens and clipping as everywhere. Two data-parallel ranks, each
    with `micro_batches`."""
    return small_config(
        folder, f"model.layers={layers}", "model.dim=14", "model.heads=1", "model.ffn_dim=9", "model.vocab_size=61",
        f"batch.global_size={2 * micro_batches}", "batch.micro_size=1", f"model.tie_embeddings={str(tied).lower()}",
        *overrides,
    )  # fmt: skip


@functools.cache
def reference(folder: Path, layers: int, micro_batches: int, tied: bool) -> Trace:
    return run_plain(pipeline_config(folder, layers, micro_batches, tied))


def assert_law(ranks, folder: Path, world: int, cases: list[tuple[int, int, bool]], **layout) -> None:
    """Each case (layers, micro-batches, tied) on the layout."""
    configs = [with_layout(pipeline_config(folder, *case), world, **layout) for case in cases]
    everyone = ranks.run(run_layouts, world, configs)
    for number, case in enumerate(cases):
        assert_all_same([traces[number] for traces in everyone], reference(folder, *case))


# By default every schedule once; between them, each stage of ZeRO with either number of micro-batches, tied and not.
ON_FOUR_RANKS = [(0, 8, False), (3, 8, True), (1, 7, False), (2, 7, True), (0, 7, True), (3, 7, False), (2, 8, False),
                 (1, 8, True), (3, 7, True)]  # fmt: skip
# By default each schedule at the stages at which four ranks do not have it.
ON_TWO_RANKS = [
    pytest.param(*schedule, zero, marks=pytest.mark.full if zero == on_four[0] else [])
    for schedule, on_four in zip(SCHEDULES, ON_FOUR_RANKS, strict=True)
    for zero in range(4)
]


@pytest.mark.parametrize("name, chunks, zero", ON_TWO_RANKS)
def test_two_ranks(ranks, folder, name, chunks, zero, full):
    cases = [(4, m, tied) for m in (4, 5) for tied in (False, True)]
    if not full:  # they take turns, so that each stage of ZeRO sees every one
        cases = [cases[(SCHEDULES.index((name, chunks)) + zero) % 4]]
    assert_law(ranks, folder, 4, cases, pipeline=2, pipeline_schedule=name, virtual_stages=chunks, zero=zero)


@pytest.mark.parametrize("name, chunks", SCHEDULES)
def test_four_ranks(ranks, folder, name, chunks, full):
    zero, micro_batches, tied = ON_FOUR_RANKS[SCHEDULES.index((name, chunks))]
    cases = [(8, m, t) for m in (8, 7) for t in (False, True)] if full else [(8, micro_batches, tied)]
    for stage in range(4) if full else [zero]:
        layout = {"pipeline": 4, "pipeline_schedule": name, "virtual_stages": chunks, "zero": stage}
        assert_law(ranks, folder, 8, cases, **layout)


@pytest.mark.parametrize("rule", ["adamw8bit", "dct", "fira", "muon", "adafactor"])
def test_rules_that_exchange_messages_and_8_bit_states(ranks, folder, rule):
    """A stage's rules see whole matrices, as they do without stages."""
    options = [f"optim={rule}", *(["optim.rank=4", "optim.refresh_every=2"] if rule in ("dct", "fira") else [])]
    config = pipeline_config(folder, 4, 4, True, *options)
    layout = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 3}
    (traces,) = zip(*ranks.run(run_layouts, 4, [with_layout(config, 4, **layout)]), strict=True)
    assert_all_same(list(traces), run_plain(config))


def test_hybrid_sharding_under_a_pipeline(ranks, folder):
    config = pipeline_config(folder, 4, 2, True, "batch.global_size=16")
    for zero in (1, 3):
        layout = {"pipeline": 2, "pipeline_schedule": "zb_h1", "zero": zero, "replicate": 2, "shard": 2}
        (traces,) = zip(*ranks.run(run_layouts, 8, [with_layout(config, 8, **layout)]), strict=True)
        assert_all_same(list(traces), run_plain(config))


def test_a_schedule_of_the_users_own(ranks, folder):
    """Several stages of the model side by side on a rank, B here and I and W there."""
    file = folder / "own.csv"
    rows = [["0F0", "1F0", "0F1", "1F1", "1I0", "0B0", "1B1", "0I1", "0W1", "1W0"],
            ["2F0", "3F0", "3B0", "2I0", "2F1", "3F1", "3I1", "2B1", "3W1", "2W0"]]  # fmt: skip
    file.write_text("\n".join(",".join(row) for row in rows) + "\n")
    config = pipeline_config(folder, 4, 2, True)
    layout = {"pipeline": 2, "pipeline_schedule": str(file), "virtual_stages": 2, "zero": 3}
    for gather in ("micro_batch", "run"):
        own = with_layout(config, 4, **layout, pipeline_gather=gather)
        (traces,) = zip(*ranks.run(run_layouts, 4, [own]), strict=True)
        assert_all_same(list(traces), reference(folder, 4, 2, True))
