"""FSDP2 as Accelerate sets it up: law 2 in float64, and what it refuses. DeepSpeed: tests/test_trainer_deepspeed.py."""

import pytest

from parity import assert_same, run_layout, small_config, with_layout

ON = ("parallel.backend=accelerate", "parallel.accelerate=fsdp2")


SPLIT = [
    (("optim=muon",), 3),
    (("optim=adamw8bit", "model.tie_embeddings=true"), 1),
    (("memory.recompute=full", "memory.compress=int8"), 2),
]


@pytest.mark.parametrize("words, zero", SPLIT)
def test_accelerates_split_is_one_process(ranks, tmp_path, words, zero):
    config = small_config(tmp_path, *words)
    reference = ranks.run(run_layout, 1, with_layout(config, 1))[0]
    split = with_layout(small_config(tmp_path, *words, *ON), 2, zero=zero)
    assert_same(ranks.run(run_layout, 2, split)[0], reference)
