"""Whole runs whose rows wait off the device: stopped, moved, and resumed from rows that do not, and back. (Law 3.)"""

import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from parity import small_config, with_layout
from rowwise.launch.worker import _reason
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.models.decoder import parameter_specs
from runs import assert_resumes_to_the_last_bit, assert_same_run, final_tensors, named, records, run_train, run_until

LAST = 4


def config_of(folder, world, *overrides, away=True):
    config = small_config(
        folder, "optim=adamw8bit", "parallel.zero=3", f"steps={LAST}", "checkpoint.every=2", "eval.every=2", "eval.batches=1",
        "model.dim=64", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=76", *overrides,
    )  # fmt: skip
    here = str(folder) if away else "none"
    memory = replace(
        config.memory, offload_params=here, offload_states="cpu" if away else "none", offload_gradients=here
    )
    return with_layout(replace(config, memory=memory), world)


def test_it_resumes_to_the_last_bit(ranks, tmp_path):
    assert_resumes_to_the_last_bit(ranks, 2, config_of(tmp_path, 2), tmp_path, stop_at=3)


def test_rows_go_into_files_and_out_of_them(ranks, tmp_path):
    """Without files, with them, and without: one run, to the last bit."""
    plain, moved = (named(config_of(tmp_path, 2, away=False), tmp_path, name) for name in ("plain", "moved"))
    ranks.run(run_train, 2, plain)
    for world, away, stop_at in ((2, False, 2), (2, True, 3), (2, False, None)):
        config = named(config_of(tmp_path, world, away=away), tmp_path, "moved")
        ranks.run(run_until, world, config, stop_at) if stop_at else ranks.run(run_train, world, config)
    assert records(plain.run_dir) == records(moved.run_dir)
    theirs = final_tensors(moved.run_dir)
    assert all(torch.equal(t, theirs[name]) for name, t in final_tensors(plain.run_dir).items())


@pytest.mark.parametrize("pipeline", [pytest.param(1, marks=pytest.mark.full), 2])
def test_it_moves_to_other_layouts(ranks, tmp_path, pipeline):
    whole = named(config_of(tmp_path, 1, away=False), tmp_path, "whole")
    ranks.run(run_train, 1, whole)
    stages = (f"parallel.pipeline={pipeline}",)
    for world, overrides, stop_at in ((3 - pipeline, (), 2), (2, stages, 3), (1, (), None)):
        config = named(config_of(tmp_path, world, *overrides), tmp_path, "moved")
        ranks.run(run_until, world, config, stop_at) if stop_at else ranks.run(run_train, world, config)
    assert_same_run(whole.run_dir, config.run_dir)


@pytest.fixture(scope="module")
def undisturbed(ranks, tmp_path_factory):
    """A run whose disk is well."""
    config = config_of(tmp_path_factory.mktemp("undisturbed"), 1, "checkpoint.background=false")
    ranks.run(run_train, 1, config)
    return config


def run_on_a_disk_that_fails(workers, config, call, folder):
    """What a run says whose folder fails in a step after the first checkpoint, at the fourth call from there."""
    real, left = getattr(os, call), [3]

    def fails(file, *given):
        if str(Path(f"/proc/self/fd/{file}").readlink()).startswith(folder):
            left[0] -= bool(complete_checkpoints(Path(config.run_dir) / "checkpoints"))
            if left[0] < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, *given)

    with mock.patch.object(os, call, fails):
        try:
            run_train(workers, config)
        except OSError as error:
            return _reason(error, Path(config.run_dir))
    return f"it went on, with {left} calls left"


@pytest.mark.parametrize(
    ("call", "option", "what"),
    [
        ("preadv", "params", "read"),
        pytest.param("preadv", "gradients", "read", marks=pytest.mark.slow),
        ("pwritev", "gradients", "written"),
    ],
)
def test_a_disk_that_fails_is_named_and_what_is_saved_is_sound(ranks, tmp_path, undisturbed, call, option, what):
    failed = named(config_of(tmp_path, 1, "checkpoint.background=false"), tmp_path, "failed")
    folder = tmp_path / option
    folder.mkdir()
    failed = replace(failed, memory=replace(failed.memory, **{f"offload_{option}": str(folder)}))
    (said,) = ranks.run(run_on_a_disk_that_fails, 1, failed, call, str(folder))
    assert re.search(
        rf"memory\.offload_{option}=\S+ cannot be {what} \(Input/output error\); give another folder, or cpu", said
    )
    ranks.run(run_train, 1, failed)
    assert records(failed.run_dir) == records(undisturbed.run_dir)


def run_on_a_full_disk(workers, config, after):
    """What a run says whose disk has room for so many tensors."""
    real, left = os.posix_fallocate, [after]

    def fails(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    with mock.patch.object(os, "posix_fallocate", fails):
        try:
            run_train(workers, config)
        except OSError as error:
            return _reason(error, Path(config.run_dir))
    return "it went on"


@pytest.mark.slow
@pytest.mark.parametrize("option", ["params", "gradients"])
def test_a_full_disk_is_named(ranks, tmp_path, option):
    """Rows have their room before the first step, parameters first; of what there was no file is left."""
    config = config_of(tmp_path, 1)
    after = len(parameter_specs(config.model)) if option == "gradients" else 0
    (said,) = ranks.run(run_on_a_full_disk, 1, config, after)
    assert re.search(rf"disk full: (\S+): memory\.offload_{option}=\1 cannot be written \(No space", said)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "tokens.bin"}
