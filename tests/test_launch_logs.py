"""Who says what, and where it stays: rank 0 and its agent in train.log, other ranks in files of their own."""

import os
import re
import signal
import subprocess
import sys

import pytest

from commands import overrides_of
from rowwise.launch import agent, start
from rowwise.launch.agent import Job
from rowwise.launch.carry_out import tell_of_failure
from rowwise.launch.outcome import Outcome
from rowwise.trainer.manifest import begin, commit
from rowwise.trainer.runlog import TRAIN_LOG, rank_log
from rowwise.trainer.stop import ASKED
from runs import manifest_at
from terminals import Terminal

SEND = """
import os, sys
from pathlib import Path
from rowwise.launch.streams import patient_streams, send_to
with patient_streams():
    send_to(Path(sys.argv[1]))
    print("out"); print("err", file=sys.stderr); os.system("echo a child")
    raise RuntimeError("the end")
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_rank_s_words_go_to_its_file(tmp_path, there):
    path = rank_log(tmp_path if there else tmp_path / "file", 3)
    (tmp_path / "file").touch()
    for _ in range(2):  # a run that goes on
        done = subprocess.run([sys.executable, "-c", SEND, str(path)], capture_output=True, text=True, check=False)
        words = path.read_text() if there else done.stdout + done.stderr
        assert words.count("RuntimeError: the end") == (1 + _ if there else 1)
        assert all(word in words for word in ("out\n", "err\n", "a child\n"))
        assert there != bool(done.stdout + done.stderr)
    assert path.name == "rank-3.log"


def test_an_agent_that_keeps_what_workers_say_tells_them_so(tmp_path, monkeypatch):
    from rowwise.launch.workers import are_logged

    for log_dir in (None, tmp_path):
        with agent._environment(Job((), tmp_path, 1, 2, log_dir=log_dir)):
            assert are_logged() == (log_dir is not None)
        assert not are_logged()


@pytest.mark.parametrize("saved", [True, False])
def test_a_failed_run_says_where_more_stands_and_how_to_go_on(tmp_path, capsys, monkeypatch, saved):
    folder = tmp_path / "run"
    (folder / "log").mkdir(parents=True)
    rank_log(folder, 1).write_text("Traceback\n")
    rank_log(folder, 2).touch()
    if saved:
        commit(begin(folder / "checkpoints", 4), {**manifest_at(4), "files": {}})
    monkeypatch.setattr(agent, "run_workers", lambda job, warm: Outcome("failed", "not a number: x", 7))
    assert start.main([f"run_dir={folder}", "nproc=1", "steps=9", "report=never"]) == 1
    said = capsys.readouterr()
    assert said.err == "failed at step 7: not a number: x\n", "what is wrong, in a line"
    box = said.out.splitlines()
    assert box[0].startswith("── run: failed at step 7 ──") and box[-1] == "─" * 79
    rows = dict(re.split(r"\s{2,}", line) for line in box[1:-1] if not line.startswith("said"))
    assert [line.split()[1] for line in box if line.startswith("said")] == [
        f"{folder}/train.log",
        f"{folder}/log/rank-1.log",
    ]
    if saved:
        assert rows["go on"] == f"rowwise train resume={folder}" and rows["export"].startswith("rowwise export")
    else:
        assert rows == {"again": f"rowwise train config={folder}/config.yaml", "look": f"rowwise report run={folder}"}
    log = (folder / TRAIN_LOG).read_text()
    assert "failed at step 7: not a number: x" in log and "── run: failed" in log


def test_a_failed_run_of_ones_own_model_goes_on_with_its_code(tmp_path, capsys):
    code = "mixers.py:Mixer"
    tell_of_failure(Job((), tmp_path, 9, 1, tree={"model": {"own": code}}), "not a number: x", 7)
    assert f"rowwise train config={tmp_path}/config.yaml model={code}\n" in capsys.readouterr().out


def test_the_agent_answers_a_signal_above_the_bar_and_in_the_log(tmp_path):
    with (
        Terminal(80) as terminal,
        pytest.MonkeyPatch.context() as patch,
        os.fdopen(os.dup(terminal.slave), "w") as stream,
    ):
        os.write(terminal.slave, b"step 1/9  ###\n  lr 1.0\x1b[1A\r\x1b[13C")
        patch.setattr(sys, "stderr", stream)
        agent.Forwarding(tmp_path).receive(signal.SIGTERM, None)
        terminal.read(0.2)
        assert "".join(terminal.lines).startswith(ASKED[:79]), "in place of the bar, which its worker paints again"
        assert "###" not in "".join(terminal.lines)
    assert ASKED in (tmp_path / TRAIN_LOG).read_text()


@pytest.mark.full
def test_a_real_run_on_a_terminal_that_is_stopped(tmp_path):
    """Two workers, by `rowwise train`, in 80 columns; Ctrl-C as a terminal sends it."""
    overrides = overrides_of(tmp_path, "steps=1000000", "schedule=constant", "checkpoint.every=0", "nproc=2")
    with Terminal(80) as terminal:
        job = terminal.start("-m", "rowwise.launch.cli", "train", *overrides, folder=tmp_path)
        terminal.until(lambda lines: any("/1000000" in line and "░" in line for line in lines))
        top = [
            line
            for line in terminal.lines
            if line.startswith(("model ", "layout ", "batch ", "numbers ", "data ", "files "))
        ]
        assert len(top) == 6
        job.send_signal(signal.SIGINT)
        lines = terminal.wait(job)
    assert job.returncode == 0
    assert any(line.startswith("asked to stop: saving") for line in lines)
    (box,) = [at for at, line in enumerate(lines) if line.startswith("── run: asked to stop: saved step")]
    assert f"go on      rowwise train resume={tmp_path}/run" in "".join(lines[box:]), "whole, however it is broken"
    assert not any("░" in line for line in lines)
    log = (tmp_path / "run" / TRAIN_LOG).read_text()
    assert "asked to stop: saved step" in log and ASKED in log and rank_log(tmp_path / "run", 1).is_file()
