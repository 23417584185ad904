"""Law 2 for ZeRO 0 to 3 and hybrid sharding."""

import functools
from pathlib import Path

import pytest

from parity import Trace, assert_all_same, run_layout, run_plain, run_together, small_config, with_layout
from rowwise.parallel import replicate

STEPS = 2  # the second sees that the update of the first arrived; a third would see no more
# world size, parallel.replicate, parallel.shard
LAYOUTS = [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 4), (4, 2, 2), (2, 2, 1)]
# By default every stage on one rank and on three, whose rows do not divide; elsewhere two stages each, which between them are all, as
# have two times two ranks with the options below.
ELSEWHERE = {(2, 1, 2): (1, 3), (4, 1, 4): (0, 2), (4, 2, 2): (1, 3), (2, 2, 1): (0, 3)}
CASES = [
    pytest.param(*layout, zero, marks=[] if zero in ELSEWHERE.get(layout, range(4)) else pytest.mark.full)
    for layout in LAYOUTS
    for zero in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


OPTIONS = {
    "tied": ("model.tie_embeddings=true",),
    "qk_norm, stable embedding": (
        "model.qk_norm=true", "model.kv_heads=3", "model.head_dim=14", "model.stable_embedding=true"
    ),
    "no accumulation, no clipping": ("batch.micro_size=6", "clip_norm=0"),
    "accumulation of three, no document mask": ("batch.micro_size=2", "data.mask_documents=false", "schedule=cosine"),
}  # fmt: skip
# By default how gradients add up at every stage in one of two ways, and what the model is at one that splits parameters.
STAGES = [
    pytest.param(
        name, zero, marks=[] if (number + zero % 2 in (2, 4) if number > 1 else zero == 3) else pytest.mark.full
    )
    for number, name in enumerate(OPTIONS)
    for zero in range(4)
]


@functools.cache
def plain(folder: Path, *overrides: str) -> Trace:
    return run_plain(small_config(folder, *overrides), STEPS)


@pytest.fixture(scope="module")
def traces(ranks, folder, full) -> dict[tuple, list[Trace]]:
    """Of every case what each rank returned; those of a mesh are run together."""
    configs = {}
    for world, replicas, shard, zero in (case.values for case in CASES if full or not case.marks):
        config = small_config(folder, f"batch.micro_size={24 // world // 2}")
        degrees = {"replicate": replicas, "shard": shard, "zero": zero}
        configs[world, replicas, shard, zero] = with_layout(config, world, **degrees)
    for name, zero in (case.values for case in STAGES if full or not case.marks):
        configs[name, zero] = with_layout(small_config(folder, *OPTIONS[name]), 4, zero=zero, replicate=2, shard=2)
    return run_together(ranks, configs, STEPS)


@pytest.mark.parametrize(("world", "replicate", "shard", "zero"), CASES)
def test_steps_equal_those_of_one_process(traces, folder, world, replicate, shard, zero):
    """Each rank with two micro-batches; `test_options_of_the_model_and_the_step` has one and three."""
    assert_all_same(traces[world, replicate, shard, zero], plain(folder))


@pytest.mark.parametrize(("name", "zero"), STAGES)
def test_options_of_the_model_and_the_step(traces, folder, name, zero):
    assert_all_same(traces[name, zero], plain(folder, *OPTIONS[name]))


def run_layout_in_small_buckets(workers, config) -> Trace:
    """The small model in buckets of its own size: three of them, the first of two parts."""
    whole, replicate.BUCKET_BYTES = replicate.BUCKET_BYTES, 20_000
    try:
        return run_layout(workers, config, STEPS)
    finally:
        replicate.BUCKET_BYTES = whole


@pytest.mark.parametrize(
    ("tied", "zero"),
    [("true", 0), ("false", 1), *(pytest.param(*case, marks=pytest.mark.full) for case in (("false", 0), ("true", 1)))],
)
def test_many_buckets(ranks, folder, zero, tied):
    config = small_config(folder, f"model.tie_embeddings={tied}", "model.layers=3", "batch.micro_size=4")
    reference = run_plain(config, STEPS)
    assert_all_same(ranks.run(run_layout_in_small_buckets, 3, with_layout(config, 3, zero=zero)), reference)


def test_the_ranks_do_get_unequal_numbers_of_valid_tokens(folder):
    from parity import global_batch
    from rowwise.trainer.data.open import open_data

    config = small_config(folder)
    batch = global_batch(config, open_data(config.data, config.batch.seq_len, config.model.vocab_size), 0)
    counts = (batch.labels >= 0).sum(dim=1).view(4, -1).sum(dim=1)
    assert len(set(counts.tolist())) == 4


def test_more_ranks_than_rows(ranks, folder):
    overrides = ("model.dim=6", "model.heads=3", "model.kv_heads=3", "model.ffn_dim=3", "model.head_dim=2")
    config = small_config(folder, *overrides)
    configs = {zero: with_layout(config, 4, zero=zero) for zero in (1, 3)}
    for traces in run_together(ranks, configs, STEPS).values():
        assert_all_same(traces, plain(folder, *overrides))
