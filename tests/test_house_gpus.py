"""Tests see no GPU unless they are asked to: on a machine with some they would run elsewhere than on one without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import run
from ranks import RankPools

ROOT = Path(__file__).parents[1]
# A torch that tells what is visible to it when it is first looked at.
CONFTEST = """
import os, runpy, sys, types
for name in ("torch", "torch.distributed"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].set_num_threads = lambda threads: print(repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
sys.modules["torch"].distributed = sys.modules["torch.distributed"]
for arguments in ([], ["--nccl"]):
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    sys.argv = ["pytest", *arguments]
    runpy.run_path("conftest.py")
"""


def test_gpus_are_hidden_before_torch_looks():
    words = [sys.executable, "-c", CONFTEST]
    said = subprocess.run(words, cwd=ROOT / "tests", capture_output=True, text=True, check=True).stdout
    assert said.split() == ["''", "'0,1'"]


def visible(workers) -> tuple[str | None, int]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), workers.rank


@pytest.mark.skipif("--nccl" in sys.argv, reason="they are to be seen")
def test_no_process_of_a_test_sees_a_gpu(ranks, tmp_path):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert ranks.run(visible, 2) == [("", 0), ("", 1)]
    program = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert run(tmp_path, [sys.executable, "-c", program]) == (0, "''\n")


def test_a_world_with_enough_gpus_sees_them_and_a_larger_one_none(monkeypatch):
    """As under --nccl on a machine with two."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pools = RankPools(gpus=2)
    monkeypatch.setattr(pools._seeing, "run", lambda function, world_size: ["NCCL"] * world_size)
    monkeypatch.setattr(pools._blind, "run", lambda function, world_size: ["gloo"] * world_size)
    assert pools.run(visible, 2) == ["NCCL"] * 2
    assert pools.run(visible, 3) == ["gloo"] * 3
    assert RankPools(gpus=0)._blind._sees_gpus is False
