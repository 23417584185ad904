"""Laws 2 and 3 for AdaLoRA: every layout has one process's penalty, importance, and choice of triplets."""

import pytest

from parity import assert_all_same, run_plain, run_together, small_config, with_layout
from runs import assert_resumes_to_the_last_bit, assert_same_run, named, run_train, run_until

# Some triplets go in most steps, and the rest stay in the last.
ADALORA = (
    "adapter=adalora", "adapter.rank=5", "adapter.target_rank=2", "adapter.start=1", "adapter.stop=5", "adapter.every=1",
    "optim.weight_decay=0.1", "steps=7",
)  # fmt: skip
DROPOUT = ("adapter.dropout=0.3", "adapter.layers=[*.attention.*, *.w2.*]", "model.frozen_dtype=nf4")
SPLIT = {"pipeline": 2, "pipeline_schedule": "zb_v", "virtual_stages": 2}
BOTH = {"ulysses": 2, "ring": 2, "ring_order": "zigzag"}
SHARED = ("model.heads=4", "model.kv_heads=2", "model.head_dim=6")
FOUR = ("model.layers=4", "batch.micro_size=1", "batch.global_size=8")
# Options -> the layouts on which they are tried.
CASES = {
    "adalora": ((*ADALORA, *SHARED), [(1, {}), (2, {"zero": 0}), (4, {**BOTH, "zero": 3})]),
    "adalora split, dropout": ((*ADALORA, *DROPOUT, *FOUR), [(4, {**SPLIT, "zero": 3})]),
    "adalora split in two": ((*ADALORA, *FOUR), [(2, SPLIT)]),
}
# Which stand for the others, unless --full.
NOW = ("adalora split in two",)
NAMES = [pytest.param(name, marks=[] if name in NOW else pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adalora")


def numbers_that_are_0(trace):
    """How many E are 0 after each step."""
    e, counts = {}, []
    for updates in trace.updates:
        for name, moved in updates.items():
            if name.endswith("lora_e"):
                e[name] = e.get(name, 0) + moved
        counts.append(sum(int((numbers.abs() < 1e-12).sum()) for numbers in e.values()))
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_one_process(ranks, folder, name):
    """Every gradient, every update, every state; triplets go, and as many as the budget says."""
    options, layouts = CASES[name]
    config = small_config(folder, *options)
    reference = run_plain(config, steps=7)
    layers = sum(name.endswith("lora_e") for name in reference.gradients[0])
    assert numbers_that_are_0(reference)[-1] == 3 * layers
    assert len(set(numbers_that_are_0(reference))) > 3
    configs = {number: with_layout(config, world, **layout) for number, (world, layout) in enumerate(layouts)}
    for traces in run_together(ranks, configs, steps=7).values():
        assert_all_same(traces, reference)


@pytest.mark.full
def test_importance_of_four_ranks_goes_on_on_one(ranks, folder):
    base = named(small_config(folder, *ADALORA, *SHARED, "eval.every=7", "eval.batches=1"), folder, "moved")
    alone = named(with_layout(base, 1), folder, "alone")
    ranks.run(run_train, 1, alone)
    ranks.run(run_until, 4, with_layout(base, 4, **BOTH, zero=3), 3)
    ranks.run(run_train, 1, with_layout(base, 1))
    assert_same_run(base.run_dir, alone.run_dir)


@pytest.mark.full
def test_stopped_and_resumed_is_the_same_to_the_last_bit(ranks, folder):
    config = with_layout(small_config(folder, *ADALORA, *DROPOUT, *FOUR), 2, **SPLIT)
    assert_resumes_to_the_last_bit(ranks, 2, config, folder, stop_at=4)
