"""Law 2 for pipelines: every schedule, cut, ZeRO stage and number of micro-batches equals one process.

`pytest --full tests/test_parallel_pipeline.py` takes the whole product of cases."""

import functools
from pathlib import Path

import pytest

from parity import Trace, assert_all_same, run_plain, run_together, small_config, with_layout

SCHEDULES = [
    ("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1), ("zb_h2", 1), ("zb_v", 2),
    ("blockwise", 1), ("blockwise", 2),
]  # fmt: skip

STEPS = 2  # the second sees that the update of the first arrived; a third would see no more


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
    return run_plain(pipeline_config(folder, layers, micro_batches, tied), STEPS)


# By default every schedule once; between them, each stage of ZeRO with either number of micro-batches, tied and not: twice as many as
# ranks, or one less, where a rank begins ahead of the others by as many, and else as many, or one more.
ON_FOUR_RANKS = [(0, 4, False), (3, 4, True), (0, 5, False), (2, 5, True), (1, 5, True), (3, 7, False), (1, 8, False),
                 (2, 8, True), (3, 7, True)]  # fmt: skip
# What these do on four ranks the others do, and more: `gpipe` is what 1f1b does in another order, zb_h1 is zb_h2 with less ahead, and
# a wave of one chunk is one of two.
ON_TWO_ALONE = [("gpipe", 1), ("gpipe", 2), ("zb_h1", 1), ("blockwise", 1)]
# Ranks of the pipeline, schedule, chunks, stage of ZeRO, micro-batches, tied.
Case = tuple[int, str, int, int, int, bool]


def by_default() -> list[Case]:
    """On two ranks each schedule at stage 3 where its four keep whole gradients, at 0 and 1, and else at 0, where they split them.
    Micro-batches and tied take turns, so that each stage sees every one."""
    found: list[Case] = []
    for number, (schedule, (zero, *case)) in enumerate(zip(SCHEDULES, ON_FOUR_RANKS, strict=True)):
        if schedule not in ON_TWO_ALONE:
            found.append((4, *schedule, zero, *case))
        turns = [(4, False), (4, True), (5, False), (5, True)]
        found.append((2, *schedule, 3 if zero < 2 else 0, *turns[number % 4]))
    return found


NOW = by_default()
ALL: list[Case] = [
    (ranks, *schedule, zero, micro_batches, tied)
    for ranks, counts in ((2, (4, 5)), (4, (4, 5, 7, 8)))
    for schedule in SCHEDULES
    for zero in range(4)
    for micro_batches in counts
    if schedule[0] not in ("zb_h2", "zb_v") or micro_batches >= 2 * ranks - 1  # the fewest that these take
    for tied in (False, True)
]


def layers_of(case: Case) -> int:
    """A stage has one; two where two ranks with one chunk each split parameters."""
    ranks, _, chunks, zero, *_ = case
    return ranks * chunks * (2 if (ranks, chunks, zero) == (2, 1, 3) else 1)


@pytest.fixture(scope="module")
def traces(ranks, folder, full) -> dict[Case, list[Trace]]:
    configs = {}
    for case in ALL if full else NOW:
        stages, name, chunks, zero, micro_batches, tied = case
        layout = {"pipeline": stages, "pipeline_schedule": name, "virtual_stages": chunks, "zero": zero}
        config = pipeline_config(folder, layers_of(case), micro_batches, tied)
        configs[case] = with_layout(config, 2 * stages, **layout)
    return run_together(ranks, configs, STEPS)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in NOW else pytest.mark.full) for c in ALL], ids=str)
def test_steps_equal_those_of_one_process(traces, folder, case):
    *_, micro_batches, tied = case
    assert_all_same(traces[case], reference(folder, layers_of(case), micro_batches, tied))


def test_rules_that_exchange_messages_and_8_bit_states(ranks, folder, full):
    """A stage's rules see whole matrices, as they do without stages."""
    layout = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2, "zero": 3}
    configs = {}
    # muon, and fira, whose messages are dct's and one more: where sequences are shared
    for rule in ("adamw8bit", "dct", "adafactor", *["muon", "fira"] * full):
        options = [f"optim={rule}", *(["optim.rank=4", "optim.refresh_every=1"] if rule in ("dct", "fira") else [])]
        configs[rule] = with_layout(pipeline_config(folder, 4, 4, True, *options), 4, **layout)
    for rule, traces in run_together(ranks, configs, STEPS).items():
        assert_all_same(traces, run_plain(configs[rule], STEPS))


def test_hybrid_sharding_under_a_pipeline(ranks, folder, full):
    config, configs = pipeline_config(folder, 2, 2, True, "batch.global_size=8"), {}
    reference = run_plain(config, STEPS)
    for zero in (1, 3) if full else (3,):
        layout = {"pipeline": 2, "pipeline_schedule": "zb_h1", "zero": zero, "replicate": 2, "shard": 2}
        configs[zero] = with_layout(config, 8, **layout)
    for traces in run_together(ranks, configs, STEPS).values():
        assert_all_same(traces, reference)


def test_a_schedule_of_the_users_own(ranks, folder):
    """Several stages of the model side by side on a rank, B here and I and W there."""
    file = folder / "own.csv"
    rows = [["0F0", "1F0", "0F1", "1F1", "1I0", "0B0", "1B1", "0I1", "0W1", "1W0"],
            ["2F0", "3F0", "3B0", "2I0", "2F1", "3F1", "3I1", "2B1", "3W1", "2W0"]]  # fmt: skip
    file.write_text("\n".join(",".join(row) for row in rows) + "\n")
    config = pipeline_config(folder, 4, 2, True)
    layout = {"pipeline": 2, "pipeline_schedule": str(file), "virtual_stages": 2, "zero": 3}
    gathered = {way: with_layout(config, 4, **layout, pipeline_gather=way) for way in ("micro_batch", "run")}
    for traces in run_together(ranks, gathered, STEPS).values():
        assert_all_same(traces, reference(folder, 4, 2, True))
