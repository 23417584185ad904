"""Law 6: a rank killed at any instant leaves a run that goes on without a lost or repeated record; a damaged checkpoint
is detected, named and passed over."""

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity import small_config, with_layout
from ranks import RankFailure
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import read_metrics
from runs import Job, await_instant, await_save, final_tensors, records, run_said, run_train, run_until


@pytest.mark.parametrize(
    "wanted", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.full)]
)
def test_killed_at_random_instants(ranks, tmp_path, wanted):
    """SIGKILL: one in two at a random instant, one in two while a checkpoint is being written. The job has no end to reach
    while it is killed; then it is given one a few steps ahead, however far it got."""
    small = small_config(
        tmp_path, "steps=1000000", "checkpoint.every=4", "batch.micro_size=6", "schedule.warmup_steps=0"
    )
    config = with_layout(small, 2, zero=3)
    log, random_instants = tmp_path / "log", random.Random(2026)
    in_saves, kills, kills_in_save = -(-wanted // 3), 0, 0
    for attempt in range(4 * wanted):
        if kills >= wanted and kills_in_save >= in_saves:
            break
        job = Job(config, 2, log)
        # In its first save or, so that the run gets on, in its second.
        in_save = await_save(job, config, 1 + attempt // 2 % 2) if attempt % 2 else await_instant(job, random_instants)
        killed = job.kill(random_instants.randrange(2))
        kills += killed
        kills_in_save += killed and in_save
        assert killed, f"the job ended before it was killed: {log.read_text()[-2000:]}"
        time.sleep(random_instants.uniform(0, 0.2))
        job.end()
    assert kills >= wanted
    assert kills_in_save >= in_saves
    assert complete_checkpoints(Path(config.run_dir) / "checkpoints"), "the kills left nothing to go on from"
    reached = read_metrics(Path(config.run_dir))[-1]["step"]
    config = replace(config, steps=reached + 10)
    assert Job(config, 2, log).wait(timeout_seconds=600) == [0, 0], log.read_text()[-3000:]  # a hang says where

    whole = replace(config, run_dir=str(tmp_path / "whole"), checkpoint=replace(config.checkpoint, every=0))
    ranks.run(run_train, 2, whole)
    assert len(records(config.run_dir)) == config.steps
    assert records(config.run_dir) == records(whole.run_dir)
    ours, theirs = final_tensors(config.run_dir), final_tensors(whole.run_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((Path(config.run_dir) / "checkpoints").glob("*.incomplete"))


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _no_device(path: Path) -> None:
    """Reading this process's memory at 0 is an error of input and output."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


DAMAGE = {
    "a flipped bit in a rank's file": ("__1_0.distcp", _flip_a_bit),
    "a truncated rank's file": ("__0_0.distcp", _truncate),
    "a missing rank's file": ("__1_0.distcp", Path.unlink),
    "a flipped bit in the metadata": (".metadata", _flip_a_bit),
    "a flipped bit in the manifest": ("manifest.json", _flip_a_bit),
    "a truncated manifest": ("manifest.json", _truncate),
    "a lost manifest": ("manifest.json", Path.unlink),
    "a rank's file that the disk does not give": ("__1_0.distcp", _no_device),
}


@pytest.fixture(scope="module")
def saved_twice(ranks, tmp_path_factory):
    """A run stopped at step 4 with checkpoints at 2 and 4, and the same run to its end."""
    folder = tmp_path_factory.mktemp("damage")
    config = with_layout(small_config(folder, "steps=6", "checkpoint.every=2"), 2, zero=1)
    ranks.run(run_until, 2, config, 4)
    whole = replace(config, run_dir=str(folder / "whole"))
    ranks.run(run_train, 2, whole)
    return config, whole


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(ranks, saved_twice, tmp_path, kind):
    config, whole = saved_twice
    shutil.copytree(config.run_dir, tmp_path / "run")
    config = replace(config, run_dir=str(tmp_path / "run"))
    newest, older = complete_checkpoints(tmp_path / "run/checkpoints")
    name, harm = DAMAGE[kind]
    harm(newest / name)
    said = ranks.run(run_said, 2, config)[0]
    assert f"{newest} is damaged: " in said
    assert name in said
    assert "passed over" in said
    assert f"resumed from {older}" in said
    assert records(config.run_dir) == records(whole.run_dir)
    ours, theirs = final_tensors(config.run_dir), final_tensors(whole.run_dir)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_no_sound_checkpoint_left_is_an_error(ranks, saved_twice, tmp_path):
    config, _ = saved_twice
    shutil.copytree(config.run_dir, tmp_path / "run")
    for checkpoint in complete_checkpoints(tmp_path / "run/checkpoints"):
        _flip_a_bit(checkpoint / "__0_0.distcp")
    with pytest.raises(RankFailure, match="no sound checkpoint is left"):
        ranks.run(run_train, 2, replace(config, run_dir=str(tmp_path / "run")))
