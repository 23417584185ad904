"""Sizes that cannot be are refused by arithmetic: at once, whichever integer of the configuration it is. (Law 5.)"""

import time
from dataclasses import replace

import psutil
import pytest
import torch

from rowwise.launch.compose import compose_tree
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.keys import flat
from rowwise.trainer.models.decoder import Decoder, ModelConfig, check_model, parameter_count, parameter_specs
from rowwise.trainer.prepare import check_room

SMALL = ModelConfig(layers=3, dim=24, heads=6, kv_heads=2, ffn_dim=40, vocab_size=50)
FORMS = [
    {}, {"tie_embeddings": True}, {"qk_norm": True}, {"stable_embedding": True}, {"head_dim": 10, "layers": 12},
    {"tie_embeddings": True, "qk_norm": True, "stable_embedding": True, "kv_heads": 6, "layers": 1},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parameters_are_counted_without_a_model_as_the_model_has_them(form):
    config = replace(SMALL, **form)
    with torch.device("meta"):
        model = Decoder(config)
    shapes = [(name, spec.shape) for name, spec in parameter_specs(config).items()]
    assert shapes == [(name, p.shape) for name, p in model.named_parameters()]
    total = sum(p.numel() for p in model.parameters())
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    assert parameter_count(config) == (total, total - looked_up)


REFUSED = {
    "a million layers": (["model.layers=1000000"], r"^model.layers=1000000: it is at least 1, and at most 10,000$"),
    "a wide model": (["model.dim=1000000000"], r"^model.dim=1000000000: it is at least 1, and at most 1,048,576$"),
    "many heads": (["model.heads=1000000000", "model.kv_heads=7"], r"model.heads=1000000000: .* at most 65,536"),
    "a vocabulary": (["model.vocab_size=1000000000000"], r"model.vocab_size=1000000000000: .* at most 268,435,456"),
    "many parameters": (
        ["model.layers=9000", "model.dim=262144", "model.ffn_dim=1048576"],
        r"model.layers=9000 model.dim=262144 .*: 9,\d{3},.* parameters, 3\d,\d{3} TB in 32 bits; at most 10,000,000,000,000",
    ),
    "a batch": (
        ["batch.global_size=1000000000000000"],
        r"batch.global_size=1000000000000000 batch.seq_len=256: 256,000,000,000,000,000 tokens a step, which take .* GB",
    ),
    "micro-batches": (
        ["batch.global_size=16777216", "batch.micro_size=1", "batch.seq_len=16"],
        r"batch.global_size=16777216 in 2 x batch.micro_size=1: 8,388,608 micro-batches a step, .*larger batch.micro_size",
    ),
    "long sequences": (["batch.seq_len=1000000000000"], r"batch.seq_len=1000000000000: 16,000,000,000,000 tokens a step"),
    "stages": (
        ["parallel.pipeline=2", "parallel.virtual_stages=1000000000", "parallel.pipeline_schedule=gpipe"],
        r"2000000000 pipeline stages .*model.layers=4: a stage has at least one layer; give at most 4",
    ),
    "what the model writes": (["sample.tokens=1000000000000"], r"sample.tokens=1000000000000: .*at most 1,000,000"),
    "patience": (["parallel.timeout_seconds=10000000000000"], r"parallel.timeout_seconds=.*: give 1 to 31536000, a year"),
    "workers": (["nproc=1000000"], r"nproc=1000000: a machine has 1 to 1024 workers"),
    "steps": ([f"steps={10**30}"], r"steps=1000.*: a run has at least 1 step, and at most 1,000,000,000,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_size_that_cannot_be_is_one_line(name):
    overrides, message = REFUSED[name]
    tree = compose_tree(overrides)
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        check(config_from_tree(tree), 2)
    assert time.process_time() - began < 1


CHOICES = {
    "": [], "optim": ["galore", "dct", "apollo", "muon", "adafactor", "adamw8bit"], "precision": ["fp16"],
    "sparsity": ["set", "srigl", "nm", "st3", "pdp", "pdp_nm"], "schedule": ["wsd", "infinite", "one_cycle", "lr_range"],
}  # fmt: skip


@pytest.mark.parametrize("group", CHOICES)
def test_any_integer_of_the_configuration_may_be_huge_and_nothing_loops_or_allocates(group):
    """What is not refused is what costs nothing, such as a distant step."""
    before, tried = psutil.Process().memory_info().rss, 0
    for choice in CHOICES[group] or [None]:
        tree = compose_tree([] if choice is None else [f"{group}={choice}"])
        keys = [key for key, value in flat(tree).items() if key.startswith(group) and is_whole(key, value)]
        tried += len(keys)
        for key in keys:
            for size in (10**6, 10**9, 10**12 + 8, 2**63, 10**30, -(10**12)):
                began = time.process_time()
                try:
                    check(config_from_tree(changed(tree, key, size)), 2)
                except ValueError as refusal:
                    assert len(str(refusal)) < 500 and "\n" not in str(refusal), f"{key}={size}: {refusal}"
                assert time.process_time() - began < 1, f"{key}={size}"
    assert tried
    assert psutil.Process().memory_info().rss - before < 200e6


def is_whole(key: str, value) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        value is None and key.endswith(("_steps", "_at", "_size", "_dim", "_unit", "rank", "nproc", "tokens"))
    )


def changed(tree: dict, key: str, value: int) -> dict:
    first, _, rest = key.partition(".")
    return {**tree, first: changed(tree[first], rest, value) if rest else value}


def test_what_this_machine_cannot_hold_is_refused_with_what_it_has():
    """At least what no rank can do without: what is refused cannot be, and what is not may be too large still."""
    shape = {"layers": 32, "dim": 4096, "heads": 32, "kv_heads": 8, "ffn_dim": 14336, "vocab_size": 128256}
    llama = ["batch.global_size=64", *(f"model.{key}={size}" for key, size in shape.items())]

    def room(gigabytes: float, *overrides: str, workers: int = 8) -> None:
        config = check(config_from_tree(compose_tree([*llama, *overrides])), workers)
        check_room(config, "NVIDIA H100", int(gigabytes * 1e9), int(40e9))

    with pytest.raises(
        ValueError, match=r"has 8,030,261,248 parameters, 32 GB of them on each rank, and NVIDIA H100 has 24 GB"
    ):
        room(24, "parallel.zero=0")
    room(34, "parallel.zero=0")
    room(24)
    with pytest.raises(ValueError, match=r"4 GB of them on each rank, and NVIDIA H100 has 3 GB; give .*more workers"):
        room(3)
    with pytest.raises(
        ValueError, match=r"batches that a rank keeps take 52 GB, and this machine has 40 GB; give a smaller batch"
    ):
        room(24, "batch.global_size=16777216", "batch.micro_size=1024")
    check_model(ModelConfig(layers=126, dim=16384, heads=128, kv_heads=8, ffn_dim=53248, vocab_size=128256))  # 405B
