"""A full disk ends a run with one line, which names what is full and where the run goes on; it leaves nothing half behind.

On real file systems of a mebibyte, where this user may mount them (root); what does not need one runs everywhere. (Law 6.)
"""

import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from commands import overrides_of, run
from rowwise.launch import agent, cli, measure, worker
from rowwise.launch.outcome import Ended, Outcome, read_outcome
from rowwise.launch.workers import share_end
from rowwise.parallel.mesh import Workers
from rowwise.trainer.files import DiskFull, want_of_room, write_whole, writing
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import MetricsLog, read_metrics
from rowwise.trainer.plan.devices import device_named
from runs import stores


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, room: int) -> None:
    """Leaves `room` bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        file.write(bytes(1 << 20))
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
        file.truncate(file.seek(0, io.SEEK_END) - room)


def ended(workers: Workers, overrides: list[str]) -> tuple[str, str]:
    """One rank of a run, and how it ended there."""
    try:
        worker.run(lambda workers: worker.resolve(overrides, workers), workers)
    except Ended as end:
        return end.state, str(end)
    return "complete", ""


def small(tmp_path: Path, disk: Path, *more: str) -> list[str]:
    return overrides_of(tmp_path, f"run_dir={disk}/run", "model.dim=8", "model.ffn_dim=8", "model.head_dim=4", *more)


FULL = {
    "metrics": (12 << 10, ["checkpoint.every=0"], "run/metrics.jsonl"),
    "a save": (80 << 10, ["checkpoint.every=2", "checkpoint.background=false"], "run/checkpoints/step-00000006.incomplete"),
    "a save in the background": (80 << 10, ["checkpoint.every=2"], "run/checkpoints/step-00000006.incomplete"),
    "the first file": (0, [], "run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def four_steps(ranks, tmp_path_factory) -> Path:
    """The folder of a run of four steps, and of what it read."""
    folder = tmp_path_factory.mktemp("four-steps")
    assert ranks.run(ended, 2, small(folder, folder, "steps=4")) == [("complete", "")] * 2
    return folder


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_up_during_a_run(ranks, four_steps, disk, case):
    """After a checkpoint at step 4; with room again, the run goes on from there."""
    room, more, written = FULL[case]
    shutil.copytree(four_steps / "run", disk / "run")
    fill(disk, room)
    (first, reason), (second, its_reason) = ranks.run(ended, 2, small(four_steps, disk, "steps=400", *more))
    saved = disk / "run/checkpoints/step-00000004"
    assert (first, second) == ("failed", "failed")
    assert reason == its_reason, "rank 1 fails for want of rank 0, and knows why"
    assert reason.startswith(f"disk full: {disk} has ")
    assert f" of 1 MiB free, writing {disk}/{written}" in reason
    assert reason.endswith(
        f"; the newest sound checkpoint is {saved}: with room there, the same command goes on from it"
    )
    assert "\n" not in reason
    assert complete_checkpoints(saved.parent) == [saved]
    left = {path.name for path in [*disk.iterdir(), *(disk / "run").iterdir(), *saved.parent.iterdir()]}
    assert left - {"outcome.json"} == {
        "filler",
        "run",
        ".lock",
        ".job",
        ".saved",
        "config.yaml",
        "metrics.jsonl",
        "memory.json",
        "starts.jsonl",
        "train.log",
        "parameters.txt",
        "checkpoints",
        saved.name,
    }
    records = (disk / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == list(range(1, len(records) + 1)), "no half of a line"
    if room:
        assert read_outcome(disk / "run") == Outcome("failed", reason, len(records)), "room was kept for it"
    (disk / "filler").unlink()
    assert ranks.run(ended, 2, small(four_steps, disk, "steps=6")) == [("complete", "")] * 2
    assert len(read_metrics(disk / "run")) == 6


def test_a_disk_that_fills_up_while_a_corpus_is_built(ranks, tmp_path, disk):
    (tmp_path / "text.txt").write_text("a line that says nothing\n" * 100_000)
    words = ["data=text", f"data.files={tmp_path}/text.txt", f"data.cache_dir={disk}/cache", f"run_dir={tmp_path}/run"]
    for state, reason in ranks.run(ended, 2, words):
        assert state == "failed"
        assert reason.startswith(f"disk full: {disk} has ")
        assert f"writing {disk}/cache/text-" in reason
        assert reason.endswith("; no checkpoint was saved yet: with room there, the same command begins anew")
    assert all(path.suffix == ".lock" for path in (disk / "cache").iterdir())
    assert not (tmp_path / "run").exists()


def test_a_disk_that_takes_no_more_files(disk):
    """It has room for bytes, which would be no answer."""
    subprocess.run(["mount", "-o", "remount,nr_inodes=3", disk], check=True)
    with pytest.raises(
        DiskFull, match=f"^disk full: {disk} has room for no more files, of 3 .df -i., writing {disk}/c$"
    ):
        for name in "abc":
            write_whole(disk / name, name)


def test_a_report_onto_a_full_disk(tmp_path, disk, capsys):
    (tmp_path / "run").mkdir()
    log = MetricsLog(tmp_path / "run", 0)
    log.append({"step": 1, "loss": 1.0, "tokens_per_second": 1.0, "step_seconds": 1.0, "tokens": 8, "lr": 1.0})
    log.close()
    (tmp_path / "run/config.yaml").write_text("name: run\nsteps: 1\n")
    fill(disk, 0)
    assert cli.main(["report", f"run={tmp_path}/run", f"to={disk}/report.html"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"failed: disk full: {disk} has 0 KiB of 1 MiB free, writing {disk}/report.html")
    assert said.count("\n") == 1
    assert [path.name for path in disk.iterdir()] == ["filler"]


@dataclass(frozen=True)
class Score:
    """As `rowwise.launch.tasks.Score`, without the harness."""

    value: float
    task: str = "task"
    metric: str = "acc"
    error: None = None


COMMANDS = {
    "average": (["run={tmp}/run", "last=2", "to={disk}/mean"], "mean"),
    "tokenize": (["data=text", "data.files={tmp}/text.txt", "to={disk}/tokens", "nproc=1"], "tokens"),
    "evaluate": (["run={tmp}/run", "tasks=task", "tasks_folder={tmp}", "to={disk}/found.json", "tokenizer=bytes"], "found.json"),
    "measure": (["to={disk}/this.yaml"], "this.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_writes_onto_a_full_disk(request, tmp_path, disk, capsys, monkeypatch, command):
    """One line on stderr, and what was computed is said before; nothing is left behind."""
    words, name = COMMANDS[command]
    if "run={tmp}/run" in words:
        run = overrides_of(tmp_path, "steps=4", "checkpoint.every=2", "model.vocab_size=256")
        assert request.getfixturevalue("ranks").run(ended, 1, run) == [("complete", "")]
    (tmp_path / "text.txt").write_text("a line that says nothing\n" * 10_000)
    scores = SimpleNamespace(Tasks=lambda *_: None, run_tasks=lambda *_: [Score(0.5)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "rowwise.launch.tasks", scores)
    found = {"flops": 1e12, "bandwidth": 1e10, "step": 1e9, "step_8bit": 1e9, "threads": 1}
    monkeypatch.setattr(measure, "timed", lambda settings: (device_named("h100"), found))
    monkeypatch.setattr(measure, "kept_file", lambda: tmp_path / "devices/here.yaml")
    capsys.readouterr()  # what the run said
    fill(disk, 8 << 10 if command in ("average", "tokenize") else 0)
    assert cli.main([command, *(word.format(tmp=tmp_path, disk=disk) for word in words)]) == 1
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if not line.startswith("data=")]
    assert line.startswith(f"failed: disk full: {disk} has ") and f"writing {disk}/{name}" in line
    assert [path.name for path in disk.iterdir()] == ["filler"]
    assert {"evaluate": "acc  0.5000", "measure": "TFLOP/s"}.get(command, "") in said.out


@pytest.mark.full
@pytest.mark.parametrize("case", ["metrics", "a save in the background"])
def test_rowwise_train_on_a_full_disk(tmp_path, disk, case):
    room, more, written = FULL[case]
    train = [sys.executable, "-m", "rowwise.launch.cli", "train", *small(tmp_path, disk, "nproc=2", "log_every=1000")]
    code, said = run(tmp_path, [*train, "steps=4"])
    assert code == 0, said
    fill(disk, room)
    code, said = run(tmp_path, [*train, "steps=400", *more])
    *_, line = said.splitlines()
    outcome = read_outcome(disk / "run")
    assert code == 1
    assert "Traceback" not in said
    assert outcome is not None and outcome.state == "failed"
    assert line == f"failed at step {outcome.step}: {outcome.reason}"
    assert f"writing {disk}/{written}" in line
    assert said.count("disk full") == 1
    assert not list((disk / "run").glob("**/*incomplete*")) + list((disk / "run").glob(".outcome*"))


BEHIND = {
    "a disk": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "what Rust says": RuntimeError("I/O error: No space left on device (os error 28)"),
    "what another rank says": CheckpointException("", {1: (OSError(errno.ENOSPC, "No space"), None)}),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", BEHIND)
def test_what_is_full_is_found_behind_what_libraries_say(case, tmp_path):
    with pytest.raises(DiskFull, match=f"writing {tmp_path}/x$") as found, writing(tmp_path / "x"):
        try:
            raise BEHIND[case]
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert ("quota" in str(found.value)) == (case == "a quota")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0
    assert want_of_room(PermissionError(errno.EACCES, "no")) is None


class _Full:
    """A file that takes a few bytes and then no more."""

    def __init__(self, file) -> None:
        self._file, self._room = file, 5

    def write(self, data: bytes) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self._room = self._file.write(data[: self._room]), 0
        return taken

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.append({"step": 1})
    log._file = _Full(log._file)
    with pytest.raises(DiskFull, match=r"metrics.jsonl"):
        log.append({"step": 2})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_outcome_that_cannot_be_written_is_said(tmp_path, capsys, monkeypatch):
    """A folder stands where it belongs: the run has ended as it has."""
    (tmp_path / "run/outcome.json").mkdir(parents=True)
    monkeypatch.setattr(agent, "warmed", contextlib.nullcontext)
    monkeypatch.setattr(agent, "run_here", lambda job, warm, attend: None)
    assert agent.run_workers(agent.Job((), tmp_path / "run", 3, 1)).state == "stopped"
    assert "warning: how the run ended is not written down: " in capsys.readouterr().err


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DiskFull, match="the quota on / is used up, writing"):
        write_whole(tmp_path / "a", "text")
    assert not list(tmp_path.iterdir())


def test_the_first_reason_is_everyones():
    first, second, third = stores(3)
    assert share_end(third, None) is None, "another error has its own traceback"
    told: list[str | None] = []
    thread = threading.Thread(target=lambda: told.append(share_end(second, "disk full: b")))
    assert share_end(first, "disk full: a") == "disk full: a"
    thread.start()
    thread.join()
    assert (told, share_end(third, None)) == (["disk full: a"], "disk full: a")
    assert share_end(Workers(), "disk full: c") == "disk full: c"


def test_a_store_that_does_not_answer_holds_nobody(monkeypatch):
    """A host that is cut off waits for its kernel, a quarter of an hour."""
    monkeypatch.setattr("rowwise.launch.workers.ANSWER_SECONDS", 0.05)
    answered = threading.Event()

    class Silent(dist.HashStore):
        def compare_set(self, *_):
            answered.wait()
            return b""

        def check(self, _):
            return not answered.wait()

    silent = Workers(1, 2, store=Silent())
    assert share_end(silent, "disk full: a") == "disk full: a"
    assert share_end(silent, None) is None
    answered.set()
