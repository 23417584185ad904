"""Laws 2 and 3 for what is frozen and for adapters: every layout is one process with whole matrices. What is refused."""

import pytest

from parity import assert_every_layout, in_micro_batches, small_config, with_layout
from runs import assert_resumes_to_the_last_bit, assert_same_run, named, run_train, run_until

LORA = ("adapter=lora", "adapter.rank=3", "adapter.alpha=7", "optim.weight_decay=0.1")
DORA = ("adapter=dora", "adapter.rank=3", "adapter.rslora=true", "adapter.b_lr_ratio=4", "adapter.train=[*norm.weight]")
DROPOUT = ("adapter.dropout=0.3", "adapter.layers=[*.attention.*, *.w2.*]")
FROZEN = (
    "optim.assign=[{match: 'embed.*', rule: frozen}, {match: 'blocks.0.*', rule: frozen}, {match: '*.w2.*', rule: frozen}]",
)
SPLIT = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}
BOTH = {"ulysses": 2, "ring": 2, "ring_order": "zigzag"}
SHARED = ("model.heads=4", "model.kv_heads=2", "model.head_dim=6")
FOUR = ("model.layers=4", "batch.micro_size=1", "batch.global_size=8")
# Options -> the layouts on which they are tried.
CASES = {
    "lora, dropout": ((*LORA, *DROPOUT, *SHARED), [(2, {"zero": 0}), (4, {**BOTH, "zero": 3})]),
    "dora split, dropout, made again": (
        (*DORA, *DROPOUT, *FOUR, "memory.recompute=full"), [(2, {**SPLIT, "zero": 0}), (4, {**SPLIT, "zero": 3})],
    ),
    "frozen": (FROZEN, [(2, {"zero": 0}), (4, {"replicate": 2, "zero": 3})]),
    "frozen split": ((*FROZEN, *FOUR, "model.tie_embeddings=true"), [(2, SPLIT), (4, {**SPLIT, "zero": 2})]),
    "lora": ((*LORA, *SHARED), [(1, {}), (2, {"zero": 3}), (4, {**BOTH, "zero": 1})]),
    "lora split": ((*LORA, *FOUR), [(2, SPLIT), (4, {**SPLIT, "zero": 3})]),
    "dora": ((*DORA, *SHARED), [(1, {}), (2, {"zero": 3}), (4, {**BOTH, "zero": 1})]),
}  # fmt: skip
# Which stand for the others, unless --full.
NOW = ("lora, dropout", "dora split, dropout, made again", "frozen split")
NAMES = [pytest.param(name, marks=[] if name in NOW else pytest.mark.full) for name in CASES]


def on(config, world: int, **layout):
    """On a layout, with two micro-batches a rank and step, or the four that a pipeline of two stages a rank takes."""
    return in_micro_batches(with_layout(config, world, **layout), 4 if "pipeline" in layout else 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_one_process(ranks, folder, name):
    """Every gradient, every update, every state; what is frozen has none of them, and stays what it was."""
    options, layouts = CASES[name]
    config = small_config(folder, *options)
    assert_every_layout(ranks, config, {n: on(config, world, **layout) for n, (world, layout) in enumerate(layouts)})


def test_adapters_of_four_ranks_go_on_on_one(ranks, folder):
    base = named(
        small_config(folder, *LORA, *DROPOUT, *SHARED, "steps=4", "eval.every=2", "eval.batches=1"), folder, "moved"
    )
    alone = named(with_layout(base, 1), folder, "alone")
    ranks.run(run_train, 1, alone)
    ranks.run(run_until, 4, with_layout(base, 4, **BOTH, zero=3), 2)
    ranks.run(run_train, 1, with_layout(base, 1))
    assert_same_run(base.run_dir, alone.run_dir)


@pytest.mark.full  # tests/test_trainer_writer.py resumes LoRA to the last bit
def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder):
    config = on(small_config(folder, *DORA, *DROPOUT, *FOUR, "steps=4"), 2, **SPLIT)
    assert_resumes_to_the_last_bit(ranks, 2, config, folder, stop_at=2)
