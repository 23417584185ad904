"""A warm process forks what it is asked for, in the environment of who asks, and ends what nobody waits for any more."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rowwise.launch.meeting import TOKEN
from rowwise.launch.warm import Warm


@pytest.fixture
def warm(monkeypatch) -> Iterator[Warm]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv(TOKEN, "of this job and of no other")
    warm = Warm(beforehand=())
    yield warm
    warm.close()


def test_a_fork_has_the_environment_of_who_asks_and_no_token(warm, monkeypatch, tmp_path):
    monkeypatch.setenv("COLOUR", "of this moment")
    logs = tmp_path / "out", tmp_path / "err"
    first = warm.start("forked:tell_oneself", "COLOUR", environment={"SHAPE": "round"}, logs=logs)
    told = warm.told_by(first)
    assert (told["pid"], told["COLOUR"]) == (first.pid, "of this moment")
    assert warm.ask("forked:tell_oneself", "SHAPE")["SHAPE"] is None, "of the first alone"
    assert warm.ask("forked:tell_oneself", TOKEN)[TOKEN] is None
    assert not any(TOKEN in line for line in warm.ask("forked:environment_at_birth"))
    await_end(warm, first)
    assert (tmp_path / "out").read_text() == f"said by {first.pid}\n"


def test_how_a_fork_ends_is_heard(warm):
    left, failed, killed = (
        warm.start("forked:leave", 7), warm.start("forked:fail"), warm.start("forked:hold", "/dev/null")
    )  # fmt: skip
    assert warm.told_by(killed) == killed.pid
    killed.end(signal.SIGKILL)
    for child in (left, failed, killed):
        await_end(warm, child)
    assert [left.code, failed.code, killed.code] == [7, 1, -signal.SIGKILL]
    with pytest.raises(RuntimeError, match="ended with 7"):
        warm.ask("forked:leave", 7)


def test_what_is_left_behind_is_asked_to_stop(warm, tmp_path):
    """Of one client, while another goes on."""
    other = Warm(warm.lend())
    held = other.start("forked:hold", str(tmp_path / "asked"))
    other.told_by(held)
    other.close()
    await_file(tmp_path / "asked")
    assert (tmp_path / "asked").read_text() == "SIGTERM"
    parent = warm.ask("forked:tell_oneself", "PATH")["parent"]
    assert psutil.Process(parent).name() == "rowwise warm"


def test_who_was_answered_waits_for_no_import(monkeypatch):
    """A refusal, say: what it would have been for is of no use any more."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    warm = Warm(beforehand=("forked", "slow_to_import"))
    warm.ask("forked:tell_oneself", "PATH")
    began = time.monotonic()
    warm.close()
    assert time.monotonic() - began < 20


def test_signals_to_all_processes_do_not_end_it(warm):
    """Slurm sends them to every process of a step: how workers ended has to be heard of."""
    parent = warm.ask("forked:tell_oneself", "PATH")["parent"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(parent, number)
    assert warm.ask("forked:tell_oneself", "PATH")["parent"] == parent


def test_one_that_is_gone_is_an_error(warm, tmp_path):
    held = warm.start("forked:hold", str(tmp_path / "asked"))
    os.kill(warm.ask("forked:tell_oneself", "PATH")["parent"], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="is gone"):
        while True:
            warm.watch(1.0)
    assert held.code == -signal.SIGKILL
    os.kill(held.pid, signal.SIGKILL)


def await_end(warm: Warm, child) -> None:
    while child.code is None:
        warm.watch(1.0)


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
