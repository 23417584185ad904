"""Law 6: a rank killed at any instant leaves a run that goes on without a lost or repeated record; a damaged checkpoint
is detected, named and passed over."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity import small_config, with_layout
from ranks import RankFailure
from rowwise.trainer.manifest import complete_checkpoints
from runs import assert_survives_kills, final_tensors, records, run_said, run_train, run_until


@pytest.mark.parametrize(
    "wanted", [3, pytest.param(5, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.full)]
)
def test_killed_at_random_instants(ranks, tmp_path, wanted):
    small = small_config(
        tmp_path, "steps=1000000", "checkpoint.every=4", "batch.micro_size=6", "schedule.warmup_steps=0"
    )
    config = with_layout(small, 2, zero=3)
    assert_survives_kills(ranks, tmp_path, config, wanted)


@pytest.mark.full
@pytest.mark.parametrize("init", ["eva", "corda"])
def test_killed_while_an_adapter_that_begins_from_data_learns(ranks, tmp_path, init):
    """Before the first checkpoint it begins anew, from the same data; after it, nothing is looked at again."""
    options = ("steps=1000000", "checkpoint.every=4", "batch.micro_size=6", "schedule.warmup_steps=0")
    adapter = ("adapter=lora", "adapter.rank=4", f"adapter.init={init}", "adapter.init_batches=2")
    assert_survives_kills(ranks, tmp_path, with_layout(small_config(tmp_path, *options, *adapter), 2, zero=3), 3)


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
    """A run stopped at step 2 with checkpoints at 1 and 2, and the same run to its end."""
    folder = tmp_path_factory.mktemp("damage")
    config = with_layout(small_config(folder, "steps=3", "checkpoint.every=1", "batch.micro_size=12"), 2, zero=1)
    ranks.run(run_until, 2, config, 2)
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
