"""Law 2 for ZeRO 0 to 3 and hybrid sharding."""

import functools

import pytest

from parity import Trace, assert_all_same, run_layout, run_plain, small_config, with_layout
from rowwise.parallel import replicate
from rowwise.trainer.config import TrainConfig

# world size, parallel.replicate, parallel.shard
LAYOUTS = [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 4), (4, 2, 2), (2, 2, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def plain(folder) -> Trace:
    return run_plain(small_config(folder))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "replicate", "shard"), LAYOUTS)
def test_three_steps_equal_those_of_one_process(ranks, folder, plain, zero, world, replicate, shard):
    """Each rank with two micro-batches; `test_options_of_the_model_and_the_step` has one, three and six."""
    config = small_config(folder, f"batch.micro_size={24 // world // 2}")
    config = with_layout(config, world, zero=zero, replicate=replicate, shard=shard)
    assert_all_same(ranks.run(run_layout, world, config), plain)


def run_layout_in_small_buckets(workers, config) -> Trace:
    """The small model in buckets of its own size: three of them, the first of two parts."""
    whole, replicate.BUCKET_BYTES = replicate.BUCKET_BYTES, 20_000
    try:
        return run_layout(workers, config)
    finally:
        replicate.BUCKET_BYTES = whole


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("override", ["model.tie_embeddings=true", "model.tie_embeddings=false"])
def test_many_buckets(ranks, folder, zero, override):
    config = small_config(folder, override, "model.layers=3")
    reference = run_plain(config)
    assert_all_same(ranks.run(run_layout_in_small_buckets, 3, with_layout(config, 3, zero=zero)), reference)


OPTIONS = {
    "tied": ("model.tie_embeddings=true",),
    "qk_norm, stable embedding": (
        "model.qk_norm=true", "model.kv_heads=3", "model.head_dim=14", "model.stable_embedding=true"
    ),
    "no accumulation, no clipping": ("batch.micro_size=6", "clip_norm=0"),
    "accumulation of six, no document mask": ("batch.micro_size=1", "data.mask_documents=false", "schedule=cosine"),
}  # fmt: skip
# By default how gradients add up at every stage, and what the model is at one that splits parameters and one that does not.
STAGES = [
    pytest.param(overrides, zero, id=f"{name}-{zero}", marks=[] if number > 1 or zero % 3 == 0 else pytest.mark.full)
    for number, (name, overrides) in enumerate(OPTIONS.items())
    for zero in range(4)
]


@pytest.mark.parametrize(("overrides", "zero"), STAGES)
def test_options_of_the_model_and_the_step(ranks, folder, zero, overrides):
    config, reference = option(folder, overrides)
    assert_all_same(ranks.run(run_layout, 4, with_layout(config, 4, zero=zero, replicate=2, shard=2)), reference)


@functools.cache
def option(folder, overrides) -> tuple[TrainConfig, Trace]:
    config = small_config(folder, *overrides)
    return config, run_plain(config)


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
    reference = run_plain(config)
    for zero in (1, 3):
        assert_all_same(ranks.run(run_layout, 4, with_layout(config, 4, zero=zero)), reference)
