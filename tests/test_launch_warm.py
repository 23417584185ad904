"""A warm process forks what it is asked for, in the environment of who asks, and ends what nobody waits for any more."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rowwise.launch import agent, local
from rowwise.launch.job import Job
from rowwise.launch.outcome import Outcome, WorkersFailed, read_outcome
from rowwise.launch.rendezvous import TOKEN
from rowwise.launch.warm import Child, Unanswered, Warm, WarmIsGone
from rowwise.trainer.stop import SIGNALS


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


def test_what_is_asked_and_told_may_be_long(warm, monkeypatch):
    """A socket takes 200 kB, and a list of files may be as long as the disk has them."""
    for number in range(3):
        monkeypatch.setenv(f"LONG_{number}", "x" * 100_000)
    files = {
        "data": {
            "files": [f"/a/folder/of/some/depth/shard-of-the-corpus-number-{number:05d}.txt" for number in range(2000)]
        }
    }
    assert warm.ask("forked:tell_again", files, list(files)) == [files, list(files), "x" * 100_000]


def test_how_a_fork_ends_is_heard(warm):
    left, failed, killed = (
        warm.start("forked:leave", 7), warm.start("forked:fail"), warm.start("forked:hold", "/dev/null")
    )  # fmt: skip
    assert warm.told_by(killed) == killed.pid
    killed.end(signal.SIGKILL)
    for child in (left, failed, killed):
        await_end(warm, child)
    assert [left.code, failed.code, killed.code] == [7, 1, -signal.SIGKILL]
    with pytest.raises(Unanswered, match="ended with exit code 7"):
        warm.ask("forked:leave", 7)


def test_who_asks_may_wait_no_longer_than_so_long(warm, monkeypatch):
    """And what did not answer is killed."""
    started, start = list[Child](), warm.start
    monkeypatch.setattr(warm, "start", lambda *asked: started.append(start(*asked)) or started[-1])
    with pytest.raises(TimeoutError):
        warm.ask("forked:say_nothing", seconds=0.1)
    while psutil.pid_exists(started[0].pid):
        warm.watch(1.0)
    assert warm.ask("forked:tell_oneself", "PATH", seconds=60.0)["pid"] != started[0].pid


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
    """Slurm sends them to every process of a step: how workers ended has to be heard of, and what they meet in is needed until
    they have saved."""
    parent = warm.ask("forked:tell_oneself", "PATH")["parent"]
    host, worker = warm.start("forked:stay", outlasts=True), warm.start("forked:stay")
    for number in SIGNALS:
        for process in (parent, host.pid):
            os.kill(process, number)
        with contextlib.suppress(ProcessLookupError):  # the first of them may have ended it
            os.kill(worker.pid, number)
    await_end(warm, worker)
    assert -worker.code in SIGNALS
    assert warm.ask("forked:tell_oneself", "PATH")["parent"] == parent
    assert host.is_there()


def test_what_outlasts_others_leaves_after_them(warm, tmp_path):
    other = Warm(warm.lend())
    host, alone = other.start("forked:stay", outlasts=True), Warm(warm.lend())
    other.told_by(other.start("forked:hold", str(tmp_path / "asked"), str(tmp_path / "saved")))
    of_nobody = alone.start("forked:stay", outlasts=True)
    other.close()
    alone.close()
    await_file(tmp_path / "asked")
    await_leaving(of_nobody)
    assert host.is_there(), "one that saves needs it"
    (tmp_path / "saved").write_text("by now")
    await_leaving(host)


def test_one_that_is_gone_is_an_error_while_something_of_it_runs(warm, tmp_path):
    held = warm.start("forked:hold", str(tmp_path / "asked"))
    warm.told_by(held)
    first = kill(warm)
    with pytest.raises(WarmIsGone):
        while True:
            warm.watch(1.0)
    with pytest.raises(WarmIsGone):
        warm.start("forked:leave", 0)
    assert held.code is None and held.is_there(), "nobody knows how it will end"
    held.end(signal.SIGKILL)
    while held.is_there():
        time.sleep(0.01)
    assert warm.ask("forked:tell_oneself", "PATH")["parent"] != first


def test_one_that_was_killed_is_followed_by_another(warm):
    """For the next trial of a search."""
    kill(warm)
    other = Warm(warm.lend())
    assert other.ask("forked:tell_oneself", "SHAPE")["SHAPE"] is None
    other.close()


def test_one_that_cannot_begin_is_not_begun_for_ever(capfd):
    for use in (lambda warm: warm.start("forked:leave", 0), Warm.lend):
        warm = Warm(beforehand=("no_such_module",))
        assert warm._process is not None
        warm._process.wait()
        with pytest.raises(WarmIsGone, match="what it printed says why"):
            use(warm)
        warm.close()
    assert capfd.readouterr().err.count("No module named 'no_such_module'") == 2


@pytest.mark.parametrize("restarts", [0, 1])
def test_workers_save_and_leave_where_it_is_killed(warm, restarts, tmp_path, monkeypatch):
    """They hold their run's folder, and nobody else would ask them to stop; then they are started again, where that is allowed."""
    started: list[Child] = []
    start = warm.start

    def start_in_place(call: str, rank: int, *given, outlasts: bool = False, **options) -> Child:
        if call == "rowwise.launch.workers:host_store":
            return start("forked:stay", outlasts=outlasts)
        again = len(started) >= 2
        started.append(start("forked:leave", 0) if again else start("forked:hold", str(tmp_path / f"asked-{rank}")))
        return started[-1]

    def attend(there: list[Child]) -> bool:
        if len(started) == 2 and all(child.told for child in started):
            kill(warm)
        return False

    monkeypatch.setattr(warm, "start", start_in_place)
    monkeypatch.setattr(local, "POLL_SECONDS", 0.02)
    job = Job((), tmp_path / "run", nproc=2, max_restarts=restarts, steps=1)
    with contextlib.nullcontext() if restarts else pytest.raises(WarmIsGone):
        local.run_here(job, warm, attend)
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2
    assert len(started) == 2 + 2 * restarts
    assert not any(child.is_there() for child in started)


@pytest.mark.parametrize(("killed", "codes"), [(False, [7, -signal.SIGTERM]), (True, [-signal.SIGKILL, 7])])
def test_the_cause_of_a_failure_comes_before_its_consequences(warm, killed, codes, tmp_path, monkeypatch):
    """Not the lowest rank; and one that the kernel kills is the cause, though others are heard of before."""
    started: list[Child] = []
    struck: list[Child] = []  # once: what was killed is soon gone, and its number another's
    start = warm.start

    def start_in_place(call: str, rank: int, *given, **options) -> Child:
        started.append(start("forked:leave", 7) if len(started) == 2 else start("forked:stay"))
        return started[-1]

    def attend(there: list[Child]) -> bool:
        if killed and started[2].code and not struck:
            struck.append(started[1])
            os.kill(started[1].pid, signal.SIGKILL)
        return False

    monkeypatch.setattr(warm, "start", start_in_place)
    with pytest.raises(WorkersFailed) as failed:
        local.run_here(Job((), tmp_path / "run", nproc=2, steps=1), warm, attend)
    assert [failure.exitcode for failure in failed.value.failures] == codes


def test_its_death_is_the_reason_that_is_written(warm, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def die(*given: object) -> None:
        raise WarmIsGone

    monkeypatch.setattr(agent, "run_here", die)
    outcome = agent.run_workers(Job((), tmp_path / "run", nproc=1, steps=1), warm)
    assert outcome == read_outcome(tmp_path / "run") == Outcome("failed", str(WarmIsGone()))


def kill(warm: Warm) -> int:
    """Kills the process, and says which it was."""
    assert warm._process is not None
    warm._process.kill()
    warm._process.wait()
    return warm._process.pid


def await_end(warm: Warm, child) -> None:
    while child.code is None:
        warm.watch(1.0)


def await_leaving(child: Child) -> None:
    deadline = time.monotonic() + 30
    while child.is_there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
