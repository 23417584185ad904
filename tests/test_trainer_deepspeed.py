"""DeepSpeed through Accelerate, the real engine on two processes: the same losses and norms as without it, and checkpoints that either
goes on from."""

import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands import overrides_of, run, run_in_pool, without_mlflow
from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import read_metrics
from runs import Job, await_save, final_tensors, records, run_train

pytestmark = pytest.mark.slow
COMMAND = ("-m", "rowwise.launch.cli", "train", "nproc=2")
# Documents apart, labels that are none, accumulation, clipping that acts: the small configuration has them all.
PLAIN = (
    *("precision=fp32", "steps=20", "schedule=constant", "schedule.warmup_steps=0", "clip_norm=0.5", "optim.lr=3e-3"),
    *("checkpoint.every=10", "checkpoint.keep=0"),
)
ON = "parallel.backend=accelerate"
AT_10 = "checkpoints/step-00000010"


def said_of(folder: Path, name: str, *words: str) -> list[str]:
    return [*overrides_of(folder, *PLAIN, *words)[1:], f"run_dir={folder / name}", f"name={name}"]


def trained(folder: Path, name: str, *words: str) -> Path:
    """The folder of a run on DeepSpeed, by the command, on two workers."""
    code, said = run(folder, [sys.executable, *COMMAND, *said_of(folder, name, ON, *words)])
    assert code == 0, said[-4000:]
    return folder / name


def without(ranks, folder: Path, name: str, *words: str) -> Path:
    """The folder of a run without it, on two ranks of the pool."""
    run_in_pool(ranks, said_of(folder, name, *words))
    return folder / name


def curve(folder: Path) -> list[tuple[float, float]]:
    return [(r["loss"], r["grad_norm"]) for r in read_metrics(folder)]


def assert_near(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for a, b in zip(mine, other, strict=True):
            assert math.isclose(a, b, rel_tol=tolerance), f"step {step}: {mine} and {other}"


@pytest.fixture(scope="module", autouse=True)
def quicker(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", without_mlflow(tmp_path_factory.mktemp("path")))
        yield


@pytest.fixture(scope="module")
def native(ranks, tmp_path_factory):
    """Two runs without DeepSpeed, tied and not."""
    folder = tmp_path_factory.mktemp("native")
    return {
        tied: without(ranks, folder, f"tied-{tied}", "parallel.zero=2", f"model.tie_embeddings={tied}")
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def stage_3(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("stage3"), "run", "parallel.zero=3", "model.tie_embeddings=true")


# Stage 1 makes steps in `test_checkpoints_go_on_on_either_side`.
@pytest.mark.parametrize(
    "zero, tied", [*(pytest.param(*one, marks=pytest.mark.long) for one in ((1, True), (2, False))), (3, True)]
)
def test_twenty_steps_are_those_without_it(native, stage_3, tmp_path, zero, tied):
    """Within the rounding of 32 bits."""
    words = (f"parallel.zero={zero}", f"model.tie_embeddings={tied}")
    ours = stage_3 if zero == 3 else trained(tmp_path, "run", *words)
    assert_near(curve(ours), curve(native[tied]), 1e-5)
    assert max(norm for _, norm in curve(ours)) > 0.5, "clipping acts"
    used = json.loads((ours / "deepspeed.json").read_text())
    assert used["engine"] == "DeepSpeedEngine" and used["stage"] == zero
    ours, theirs = final_tensors(ours), final_tensors(native[tied])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # parameters, and both of AdamW's moments
        torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=2e-5 * float(tensor.abs().max()), msg=name)


def test_checkpoints_go_on_on_either_side(native, stage_3, ranks, tmp_path):
    """Ten steps on one, five on the other, at other stages and on another number of ranks: the curve of those that stayed."""
    whole, words = curve(native[True]), ("model.tie_embeddings=true", "steps=15")
    alone = with_layout(
        config_from_tree(compose_tree(said_of(tmp_path, "alone", f"resume={stage_3 / AT_10}", *words))), 1
    )
    ranks.run(run_train, 1, alone)
    second_copy = ("parallel.zero=3", "parallel.deepspeed.hpz=2")
    again = trained(tmp_path, "again", f"resume={stage_3 / AT_10}", *second_copy, *words)
    over = trained(tmp_path, "over", f"resume={native[True] / AT_10}", "parallel.zero=1", *words)
    for folder in (Path(alone.run_dir), again, over):
        assert_near(curve(folder), whole[10:15], 1e-4)


def test_sixteen_bits_are_those_without_it(ranks, tmp_path):
    """Masters begin with the very same numbers; what follows is as near as rounding to 16 bits lets it be."""
    theirs = without(ranks, tmp_path, "native", "precision=bf16", "steps=8")
    ours = trained(tmp_path, "run", "precision=bf16", "steps=8", "parallel.zero=2")
    assert curve(ours)[0][0] == curve(theirs)[0][0], "the first forward is the same to the last bit"
    assert_near(curve(ours), curve(theirs), 2e-2)


@pytest.mark.long
def test_offload_to_host_and_files(native, tmp_path, monkeypatch):
    """Compiles DeepSpeed's kernels where that was not done: minutes. The files are there while it runs, and gone after."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)  # what is compiled is kept beyond these tests
    (tmp_path / "files").mkdir()
    for name, place in {"host": "cpu", "infinity": tmp_path / "files"}.items():
        words = (f"parallel.deepspeed.offload_optimizer={place}", f"parallel.deepspeed.offload_params={place}")
        ours = trained(tmp_path, name, "parallel.zero=3", *words, "model.tie_embeddings=true")
        assert_near(curve(ours), curve(native[True]), 1e-5)
        assert json.loads((ours / "deepspeed.json").read_text())["rules"] == ["HostAdamW"]
    assert not list((tmp_path / "files").iterdir())


@pytest.mark.long
def test_killed_at_random_instants(ranks, tmp_path, monkeypatch):
    """SIGKILL of a rank, ten times, one in two in a save, the others from its start on: no record is lost
    or repeated, and the run ends where one ends that was never killed."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = ("precision=fp32", ON, "checkpoint.every=3", "batch.micro_size=6", "schedule.warmup_steps=0")
    config = with_layout(small_config(tmp_path, *words, "steps=1000000"), 2, zero=2)
    log, instants = tmp_path / "log", random.Random(2027)
    for attempt in range(10):
        job = Job(config, 2, log)
        if attempt % 2:
            await_save(job, config, 1 + attempt // 2 % 2)
        else:
            time.sleep(instants.uniform(0, 12))
        assert job.kill(instants.randrange(2)), f"the job ended before it was killed: {log.read_text()[-2000:]}"
        job.end()
    assert complete_checkpoints(Path(config.run_dir) / "checkpoints")
    reached = read_metrics(Path(config.run_dir))[-1]["step"]
    config = replace(config, steps=reached + 5)
    assert Job(config, 2, log).wait(timeout_seconds=600) == [0, 0], log.read_text()[-3000:]
    whole = replace(config, run_dir=str(tmp_path / "whole"), checkpoint=replace(config.checkpoint, every=0))
    assert Job(whole, 2, log).wait(timeout_seconds=600) == [0, 0], log.read_text()[-3000:]
    assert [r["step"] for r in read_metrics(Path(config.run_dir))] == list(range(1, config.steps + 1))
    assert records(config.run_dir) == records(whole.run_dir)
