"""memory.offload_states: a run whose optimizer states wait in host memory or in files is the run whose states do not, to the last bit,
and one that goes on from either goes on as the other would. (Laws 2, 3, 5 and 6.)"""

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_optim_rules import LOW, SHAPES

from parity import assert_all_same, run_layout, run_layouts, run_plain, small_config, with_layout
from rowwise.launch.worker import _reason
from rowwise.optim import optimizer as module
from rowwise.parallel.mesh import make_mesh
from rowwise.trainer import rollback
from rowwise.trainer.activations import micro_batch_bytes
from rowwise.trainer.advice import warnings
from rowwise.trainer.assemble import assemble
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.offloading import check_folder, state_bytes_of
from runs import assert_survives_kills, final_tensors, named, records, run_train, run_until

SMALL = 40_000  # bytes of a portion: matrices are cut within
EVOLVING = ("sparsity=rigl", "sparsity.update_every=1", "sparsity.stop_at=2")
INSIDE = ("optim.in_backward=true", "clip_norm=0", "batch.micro_size=8", "batch.global_size=24")
# What a rule sends is met at stages 1 to 3, each kind of state once, and every way in which a step is made.
RUNS = {
    "zero 0": (3, {"zero": 0}, ("optim=adamw8bit",)),
    "zero 1": (3, {"zero": 1}, ("optim=muon",)),
    "zero 2": (3, {"zero": 2}, ("optim=fira", *LOW)),
    "zero 3": (3, {"zero": 3}, ("optim=adafactor",)),
    "one rank": (1, {"zero": 3}, ("optim=lion8bit",)),
    "assign": (3, {"zero": 3}, ("optim=apollo_mini", LOW[1], "optim.assign=[{match: embed.weight, rule: adamw8bit}]")),
    "pipeline": (2, {"zero": 0, "pipeline": 2}, ("optim=dct", *LOW, "model.layers=2")),
    "ulysses": (2, {"zero": 3, "ulysses": 2}, ("optim=apollo", *LOW, "model.heads=2", "model.kv_heads=2")),
    "replicas": (4, {"zero": 3, "replicate": 2, "shard": 2}, ("optim=galore", *LOW)),
    "in the backward": (3, {"zero": 3}, ("optim=adamw", *INSIDE)),
    "in the backward, whole": (3, {"zero": 0}, ("optim=adamw8bit", *INSIDE)),
    "in the backward, messages": (3, {"zero": 3}, ("optim=muon", *INSIDE)),
    "masks": (3, {"zero": 3}, ("optim=adamw", *EVOLVING)),
    "16 bits": (3, {"zero": 1}, ("optim=adamw8bit", "precision=bf16", "optim.param_dtype=bf16")),
}

# For these others stand: a rule's message at another stage, adamw8bit in 16 bits and in the backward, masks under rows in files
# (test_parallel_away); zero 1 in "16 bits", zero 3 in "in the backward, messages".
FULL = ("zero 0", "zero 1", "zero 3", "replicas", "ulysses", "in the backward", "in the backward, whole", "masks")

ON_THE_HOST = ("one rank", "zero 2")  # too, unless in full: for a rank alone and for what sends messages


def config_of(folder, *words):
    return small_config(folder, *SHAPES, "precision=fp32", "optim.lr=0.01", *words)


def run_both(workers, configs):
    with mock.patch.object(module, "PORTION_BYTES", SMALL):
        return run_layouts(workers, configs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in RUNS]
)
def test_steps_are_the_same_to_the_last_bit(ranks, tmp_path, name, full):
    world, degrees, words = RUNS[name]
    configs = [
        with_layout(config_of(tmp_path, *words, f"memory.offload_states={where}"), world, **degrees)
        for where in ("none", *["cpu"] * (full or name in ON_THE_HOST), tmp_path)
    ]
    here, *others = ranks.run(run_both, world, configs)[0]
    assert here.updates[0] and here.states[0]
    for away in others:
        assert (away.losses, away.norms) == (here.losses, here.norms)
        for kind in ("gradients", "updates", "states", "masks"):
            for ours, theirs in zip(getattr(away, kind), getattr(here, kind), strict=True):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], t) for key, t in theirs.items()), kind


@pytest.mark.parametrize(
    ("rule", "where"),
    [
        ("dct", "files"),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("adamw8bit", "files"), ("muon", "cpu"))),
    ],
)
def test_three_steps_equal_those_of_the_textbook(ranks, tmp_path, rule, where):
    low = LOW if rule == "dct" else ()
    place = tmp_path if where == "files" else where
    config = small_config(tmp_path, f"optim={rule}", *SHAPES, "optim.lr=0.01", *low, f"memory.offload_states={place}")
    assert_all_same(ranks.run(run_layout, 3, with_layout(config, 3, zero=3)), run_plain(config))


def saved(ranks, folder, name, world, resume="never", stop_at=None, **given):
    """The folder of a run of four steps that saves every second one."""
    where, degrees = given.pop("where"), given
    config = config_of(folder, "optim=adamw8bit", "steps=4", "checkpoint.every=2", f"memory.offload_states={where}")
    config = replace(named(config, folder, name), resume=resume)
    config = with_layout(config, world, **degrees)
    ranks.run(*((run_until, world, config, stop_at) if stop_at else (run_train, world, config)))
    return config.run_dir


def test_a_run_goes_on_whether_its_states_wait_or_not(ranks, tmp_path):
    """From files to memory and back, to the last bit; on another layout it goes on too."""
    whole = saved(ranks, tmp_path, "whole", 2, zero=3, where="none")
    for first, then in ((tmp_path, "none"), ("none", tmp_path)):
        name = f"{first == tmp_path}"
        saved(ranks, tmp_path, name, 2, "auto", stop_at=1, zero=3, where=first)
        run_dir = saved(ranks, tmp_path, name, 2, "auto", zero=3, where=then)
        assert records(run_dir) == records(whole)
        ours, theirs = final_tensors(run_dir), final_tensors(whole)
        assert all(torch.equal(ours[key], t) for key, t in theirs.items())
    moved = saved(ranks, tmp_path, "moved", 1, f"{whole}/checkpoints/step-00000002", zero=0, where=tmp_path)
    assert [r[0] for r in records(moved)] == [3, 4]
    assert [r[1] for r in records(moved)] == pytest.approx([r[1] for r in records(whole)[2:]], rel=1e-4)


def test_a_rollback_goes_back_with_states_in_files(ranks, tmp_path):
    """Which are then those of the checkpoint, in a file of their own; the one before is free."""
    words = ("on_spike=rollback", "checkpoint.every=2", "steps=5", f"memory.offload_states={tmp_path}")
    config = with_layout(config_of(tmp_path, *words), 2, zero=3)
    plain = replace(named(config, tmp_path, "plain"), memory=replace(config.memory, offload_states="none"))
    for one in (config, plain):
        ranks.run(run_with_a_spike, 2, one)
    assert records(config.run_dir) == records(plain.run_dir)
    assert '"rolled back"' in Path(config.run_dir, "metrics.jsonl").read_text()


def run_with_a_spike(workers, config: TrainConfig) -> None:
    def spike(seen, loss, norm, config):
        return 99.0 if len(seen.losses) == 3 and not seen.rollbacks else None

    with mock.patch.object(rollback, "spike_of", spike):
        run_train(workers, config)


def away(tmp_path, where, *words):
    return with_layout(small_config(tmp_path, f"memory.offload_states={where}", *words), 1)


def test_the_bytes_of_states_are_known_before(ranks, tmp_path):
    """As the file has them, but for what it rounds up."""
    for words in (("optim=adamw",), ("optim=adamw8bit",), ("optim=adafactor",)):
        config = with_layout(config_of(tmp_path, *words, f"memory.offload_states={tmp_path}"), 2, zero=3)
        said, (taken, tensors) = state_bytes_of(config), ranks.run(file_of, 2, config)[0]
        assert said <= taken <= said + 4096 * tensors  # whole blocks


def file_of(workers, config):
    """The bytes of the file of a rank's states, and how many tensors lie in it."""
    built = assemble(config, make_mesh(config.parallel, workers))
    (file,) = built.files
    size, tensors = file.size, sum(len(state) for state in built.optimizer.state.values())
    built.close()
    return size, tensors


def test_a_folder_must_be_one_and_have_room(tmp_path, monkeypatch):
    check_folder(away(tmp_path, "none"))
    check_folder(away(tmp_path, "cpu"))
    check_folder(away(tmp_path, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"], "the probe is gone"
    with pytest.raises(
        ValueError, match=r"memory.offload_states=nvme: there is no such folder; possible are none, cpu, or the"
    ):
        check_folder(away(tmp_path, "nvme"))
    size = state_bytes_of(away(tmp_path, tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * size))
    check_folder(away(tmp_path, tmp_path), ranks=2)  # and a copy of both
    check_folder(away(tmp_path, tmp_path, "checkpoint.background=false"), ranks=5)
    with pytest.raises(ValueError, match=r"offload_states=\S+: 3 ranks of this machine keep 0.0 GB of optimizer states and the copy "
                       r"of a save in the background there, and it has 0.0 GB free; give .*checkpoint.background=false"):  # fmt: skip
        check_folder(away(tmp_path, tmp_path), ranks=3)


def test_what_activations_take_of_a_disk_is_not_free(tmp_path, monkeypatch):
    words = (f"memory.offload_activations={tmp_path}", "checkpoint.background=false")
    states, both = away(tmp_path, tmp_path), away(tmp_path, tmp_path, *words)
    needed = state_bytes_of(states) + micro_batch_bytes(both)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    check_folder(replace(both, memory=replace(both.memory, offload_activations="none")))
    with pytest.raises(ValueError, match=r"memory.offload_states=\S+: a rank keeps"):
        check_folder(both)


def test_a_run_says_what_waits_where(tmp_path):
    data = SimpleNamespace(vocab_size=0)
    (said,) = warnings(away(tmp_path, tmp_path), data, torch.device("cpu"))
    assert re.fullmatch(r"warning: memory.offload_states=\S+ takes [\d,]+ MB/s: the optimizer states of a rank, \d.\d MB, are read "
                        r"and written in every step, .*", said)  # fmt: skip
    (said,) = warnings(away(tmp_path, "cpu"), data, torch.device("cpu"))
    assert "memory.offload_states=cpu on a CPU saves nothing" in said


EIGHT_STEPS = ("optim=adamw", "steps=8", "checkpoint.every=2")


@pytest.fixture(scope="module")
def undisturbed(ranks, tmp_path_factory) -> TrainConfig:
    """A run whose states wait nowhere, and whose disk is well."""
    config = with_layout(config_of(tmp_path_factory.mktemp("undisturbed"), *EIGHT_STEPS), 1)
    ranks.run(run_train, 1, config)
    return config


def ended(workers, config, call, error, after):
    """How a rank of a run ends whose disk gives an error from the so-manieth call on."""
    real, left = getattr(os, call), [after]

    def fails(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(error, os.strerror(error))
        return real(*given)

    with mock.patch.object(os, call, fails):
        try:
            run_train(workers, config)
        except OSError as error:
            return _reason(error, Path(config.run_dir))
    return f"it went on, with {left} calls left"


@pytest.mark.parametrize(
    ("call", "error", "after", "said"),
    [
        (
            "posix_fallocate",
            errno.ENOSPC,
            3,
            r"disk full: (\S+): memory.offload_states=\1 cannot be written \(No space",
        ),
        (
            "preadv",
            errno.EIO,
            100,
            r"memory.offload_states=\S+ cannot be read \(Input/output error\); give another folder, or cpu",
        ),
        (
            "pwritev",
            errno.EIO,
            130,
            r"memory.offload_states=\S+ cannot be written \(Input/output error\); give another",
        ),
        (
            "copy_file_range",
            errno.ENOSPC,
            40,
            r"disk full: (\S+): memory.offload_states=\1 cannot be copied for a save in",
        ),
    ],
)
def test_an_error_of_the_disk_ends_the_run_in_one_line(ranks, tmp_path, undisturbed, call, error, after, said):
    """Checkpoints that were saved stay sound, and the run goes on from them: no record is lost, and none is there twice."""
    config = with_layout(config_of(tmp_path, *EIGHT_STEPS, f"memory.offload_states={tmp_path}"), 1)
    (told,) = ranks.run(ended, 1, config, call, error, after)
    assert re.search(said, told) and "\n" not in told
    assert bool(complete_checkpoints(Path(config.run_dir) / "checkpoints")) == (call != "posix_fallocate")
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "tokens.bin"}
    ranks.run(run_train, 1, config)
    assert records(config.run_dir) == records(undisturbed.run_dir)
    ours, theirs = final_tensors(config.run_dir), final_tensors(undisturbed.run_dir)
    assert all(torch.equal(ours[key], t) for key, t in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [5, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_instants(ranks, tmp_path, wanted):
    """With states and rows in files and saves from copies of them: no file is left, and a sound checkpoint is there."""
    waits = (f"memory.offload_{kind}={tmp_path / 'files'}" for kind in ("states", "params", "gradients"))
    words = (
        "steps=1000000",
        "checkpoint.every=4",
        "batch.micro_size=6",
        "schedule.warmup_steps=0",
        "parallel.zero=3",
        *waits,
    )
    (tmp_path / "files").mkdir()
    assert_survives_kills(ranks, tmp_path, with_layout(small_config(tmp_path, *words), 2), wanted)
    assert not list((tmp_path / "files").iterdir())
