"""A run on two hosts of which one is cut off, loses a worker, or loses its torchrun; under torchrun itself.

    make test-slurm                         (root, and `ip` with network namespaces)

What bounds the time that a host which was cut off costs (measured, and asserted below):

    the others go on      max(parallel.timeout_seconds, keep_alive_interval x keep_alive_max_attempt) + last_call_timeout
                          + the start of the workers
    the host itself ends  max(parallel.timeout_seconds, read_timeout, how long its kernel repeats what nobody answers)

The last is net.ipv4.tcp_retries2: 15 minutes by default, and torch's store sets no bound of its own. Its workers are gone
after the first and the seconds for which they ask the store why (launch.workers); only torchrun waits so long.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from commands import PATIENCE, overrides_of
from hosts import Host, Network
from parity import TOLERANCE
from rowwise.launch.outcome import Outcome, read_outcome
from rowwise.launch.workers import ANSWER_SECONDS
from rowwise.trainer.metrics import read_metrics
from runs import SAME_EVERYWHERE, records

pytestmark = pytest.mark.slow

STEPS = 60
TIMEOUT, LAST_CALL, READ = 8, 2, 8
KEEP_ALIVE_INTERVAL, KEEP_ALIVE_ATTEMPTS = 2, 3
KEEP_ALIVE = KEEP_ALIVE_INTERVAL * KEEP_ALIVE_ATTEMPTS
# The first after 0.2 s, or up to 0.3 where answers had taken unequally long on a busy machine; then each after twice as long. The
# kernel gives up at the last of them or at the next.
TCP_RETRIES, TCP_SECONDS = 4, 0.3 * (2**6 - 1)
POLL = 3  # the rendezvous is looked at once a second, by each of three steps: leaving it, joining it, closing it
ALONE = max(TIMEOUT, READ, TCP_SECONDS)  # that a host has which has lost the rendezvous, until it leaves
FOLLOW = 2  # that workers have whose torchrun was killed
CUT_AT = 15
OWN_LAST_CALL, OWN_KEEP_ALIVE = 10, 15  # of launch.agent, and torch's own


class Trial:
    """One run on two hosts, started by torchrun on each."""

    def __init__(self, hosts: list[Host], folder: Path, keeper: int = 0, nodes: str = "1:2", restarts: int = 3):
        self.hosts, self.folder, self.keeper = hosts, folder, hosts[keeper]
        self.nodes, self.restarts = nodes, restarts
        self.start()

    def start(self) -> None:
        began, fewest = time.monotonic(), self.steps()
        self.agents = [host.start(self.command(host), self.folder) for host in self.hosts]

        def made() -> bool:  # a run that goes on first drops the steps beyond its checkpoint
            nonlocal fewest
            fewest = min(fewest, self.steps())
            return self.steps() > fewest

        self.until(made, PATIENCE, "no step was made")
        self.start_seconds = time.monotonic() - began  # of the agents and of the workers
        # At most: what else this machine does is not always the same.
        self.again_seconds = 2 * self.start_seconds
        leaving = max(POLL, self.start_seconds)
        self.leave_seconds, self.alone_seconds = ANSWER_SECONDS + leaving, ALONE + leaving

    def command(self, host: Host) -> list[str]:
        rendezvous = (
            f"is_host={int(host is self.keeper)},last_call_timeout={LAST_CALL},read_timeout={READ},join_timeout=60,"
            f"keep_alive_interval={KEEP_ALIVE_INTERVAL},keep_alive_max_attempt={KEEP_ALIVE_ATTEMPTS}"
        )
        torchrun = [
            "--nnodes", self.nodes, "--nproc-per-node", "1", "--max-restarts", str(self.restarts), "--rdzv-id", "trial",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.keeper.address}:29400", "--rdzv-conf", rendezvous,
            "--local-addr", host.address, "-m", "rowwise.launch.train",
        ]  # fmt: skip
        return [sys.executable, "-m", "torch.distributed.run", *torchrun, *overrides(self.folder)]

    def steps(self) -> int:
        return len(read_metrics(self.folder / "run"))

    def until(self, done: Callable[[], bool], seconds: float, complaint: str) -> float:
        """Waits, at most `seconds`; returns how long that took."""
        began = time.monotonic()
        while not done():
            assert time.monotonic() - began < seconds, f"{complaint} in {seconds:.1f} s\n{self.said()[-6000:]}"
            time.sleep(0.05)
        return time.monotonic() - began

    def until_step(self, step: int, seconds: float = PATIENCE) -> float:
        return self.until(lambda: self.steps() >= step, seconds, f"step {step} was not reached")

    def until_goes_on(self, since: float, bound: float) -> float:
        """Waits for the next step, at most `bound` from `since`; returns how long that took from there."""
        self.until_step(self.steps() + 1, since + bound - time.monotonic())
        return time.monotonic() - since

    def cut(self, host: Host) -> float:
        """Cuts `host` off in the middle of training; returns when."""
        self.until_step(CUT_AT)
        host.cut()
        return time.monotonic()

    def until_gone(self, host: Host, seconds: float) -> float:
        return self.until(lambda: not host.processes(), seconds, f"{host.address} was not left")

    def code(self, host: Host) -> int | None:
        return self.agents[self.hosts.index(host)].wait(1)

    def said(self) -> str:
        return "\n".join(f"--- {host.address}\n{host.log(self.folder).read_text()}" for host in self.hosts)


class OwnTrial(Trial):
    """The same started by `rowwise train`, which sets the waits itself and leaves the kernel's as they are."""

    def command(self, host: Host) -> list[str]:
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text("known to both hosts alone")
        rendezvous = ["--nodes", self.nodes, "--rendezvous", f"{self.keeper.address}:29400", "--job", "trial"]
        rendezvous += ["--token", str(token)]
        restarts = ["--max-restarts", str(self.restarts)]
        return [
            sys.executable,
            "-m",
            "rowwise.launch.start",
            *rendezvous,
            *restarts,
            "nproc=1",
            *overrides(self.folder),
        ]


def overrides(folder: Path) -> list[str]:
    return overrides_of(
        folder, f"steps={STEPS}", "precision=fp64", "batch.global_size=24", "batch.micro_size=6", "checkpoint.every=10",
        f"parallel.timeout_seconds={TIMEOUT}", "parallel.zero=2",
        "report=never",  # a worker that ends would make one, in 2 s of a core, before it is gone
    )  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with Network() as hosts:
        for host in hosts:
            host.run("sysctl", "-qw", f"net.ipv4.tcp_retries2={TCP_RETRIES}")
        yield hosts
        assert not [process for host in hosts for process in host.processes()], "something was left running"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[tuple]:
    """The records of the same run in one process, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with Network() as (host, _):
        assert (
            host.start([sys.executable, "-m", "rowwise.launch.train", *overrides(folder)], folder).wait(PATIENCE) == 0
        )
    return records(folder / "run")


def assert_same(folder: Path, whole: list[tuple]) -> None:
    """No step is missing and none comes twice; the numbers are those of the whole run."""
    ours = records(folder / "run")
    assert [record[0] for record in ours] == list(range(1, STEPS + 1))
    assert len(ours[0]) == len(SAME_EVERYWHERE)
    np.testing.assert_allclose(np.array(ours), np.array(whole), rtol=TOLERANCE)


def assert_same_so_far(folder: Path, whole: list[tuple]) -> None:
    """Of a run that ended before its last step."""
    done = records(folder / "run")
    assert CUT_AT <= len(done) < STEPS and [record[0] for record in done] == list(range(1, len(done) + 1))
    np.testing.assert_allclose(np.array(done), np.array(whole[: len(done)]), rtol=TOLERANCE)


def report(**seconds: float) -> None:
    print({name: round(value, 1) for name, value in seconds.items()}, file=sys.__stderr__)


def assert_ends(trial: Trial, kept: list[Host], whole: list[tuple]) -> None:
    for host in kept:
        trial.until_gone(host, PATIENCE)
        assert trial.code(host) == 0, trial.said()[-6000:]
    assert_same(trial.folder, whole)


def test_a_host_is_cut_off_from_our_own_launcher(tmp_path, uninterrupted):
    """With the kernel's own patience of a quarter of an hour: the agent bounds it. The other goes on, and its workers leave first."""
    with Network() as (kept, lost):
        trial = OwnTrial([kept, lost], tmp_path)
        cut = trial.cut(lost)
        workers_left = trial.until(
            lambda: not lost.workers(), TIMEOUT + trial.leave_seconds, "the workers of the lost host did not leave"
        )
        trial.until_gone(lost, cut + trial.alone_seconds + OWN_LAST_CALL - time.monotonic())
        left = time.monotonic() - cut
        bound = max(TIMEOUT, OWN_KEEP_ALIVE) + OWN_LAST_CALL + POLL + trial.again_seconds
        went_on = trial.until_goes_on(cut, bound)
        assert trial.code(lost) == 1
        assert_ends(trial, [kept], uninterrupted)
        assert read_outcome(tmp_path / "run") == Outcome("complete", None, STEPS)
    report(bound=bound, start=trial.start_seconds, workers_left=workers_left, agent_left=left, went_on=went_on)


def test_rank_0_was_on_the_lost_host_and_is_not_yet_gone(hosts, tmp_path, uninterrupted):
    """Under torchrun, whose survivor begins again within the bound. Hosts are ranked by address. The new rank 0 waits until the old
    one, here frozen, has let go of the run."""
    trial, (lost, kept) = Trial(hosts, tmp_path, keeper=1), hosts
    cut, before = trial.cut(lost), {worker.pid for worker in kept.workers()}
    (old,) = lost.workers()
    old.suspend()
    bound = max(TIMEOUT, KEEP_ALIVE) + LAST_CALL + POLL + trial.again_seconds
    left = cut + bound - time.monotonic()
    trial.until(lambda: any(worker.pid not in before for worker in kept.workers()), left, "no worker was started")
    began = time.monotonic() - cut
    (new,), reached = kept.workers(), trial.steps()
    time.sleep(trial.start_seconds / 2)  # it is past its start
    assert trial.steps() == reached and [worker.pid for worker in kept.workers()] == [new.pid], trial.said()[-6000:]
    old.resume()
    thawed = time.monotonic()
    trial.until(lambda: not lost.workers(), trial.leave_seconds, "the old rank 0 did not leave")
    went_on = trial.until_goes_on(thawed, POLL + trial.again_seconds)
    trial.until_gone(lost, max(cut + trial.alone_seconds, thawed + POLL) - time.monotonic())
    assert_ends(trial, [kept], uninterrupted)
    report(bound=bound, start=trial.start_seconds, began=began, went_on_after_thaw=went_on)


def test_the_host_of_the_rendezvous_is_lost_and_then_its_torchrun_is_killed(hosts, tmp_path, uninterrupted):
    """Nobody can meet any more: the other host ends. The same command goes on. Then a torchrun is killed while its worker waits, which
    leaves also in the middle of a collective, and with no store left."""
    trial, (lost, kept) = Trial(hosts, tmp_path), hosts
    cut = trial.cut(lost)
    lost.kill()
    trial.until_gone(kept, trial.alone_seconds)
    ended = time.monotonic() - cut
    assert trial.code(kept) == 1
    lost.mend()
    trial.start()
    assert trial.said().count("resumed from") == 1
    cut = trial.cut(kept)
    time.sleep(1)
    trial.agents[0].kill()
    left = trial.until_gone(lost, FOLLOW)
    trial.until_gone(kept, cut + trial.alone_seconds - time.monotonic())
    assert_same_so_far(tmp_path, uninterrupted)
    report(bound=trial.alone_seconds, ended=ended, left=left, other_left=time.monotonic() - cut)


def test_a_fixed_job_outlasts_a_short_cut_and_ends_on_both_hosts_after_a_long_one(hosts, tmp_path, uninterrupted):
    """TCP repeats itself after twice the time, so the link must be back within half of what the workers wait."""
    trial = Trial(hosts, tmp_path, nodes="2", restarts=0)
    cut, workers = trial.cut(hosts[1]), [host.workers() for host in hosts]
    time.sleep(TIMEOUT * 0.3)
    hosts[1].mend()
    went_on = trial.until_goes_on(cut, TIMEOUT)
    assert [host.workers() for host in hosts] == workers
    cut = trial.cut(hosts[1])
    trial.until_gone(hosts[0], TIMEOUT + trial.leave_seconds)
    left = time.monotonic() - cut
    trial.until_gone(hosts[1], cut + trial.alone_seconds - time.monotonic())
    assert [trial.code(host) for host in hosts] == [1, 1]
    assert_same_so_far(tmp_path, uninterrupted)
    report(went_on=went_on, keeper_left=left, other_left=time.monotonic() - cut, bound=trial.alone_seconds)


@pytest.mark.long  # a lost worker is what tests/attack kills, and a lost torchrun stands in the two before
def test_a_worker_is_lost_and_then_a_torchrun(hosts, tmp_path, uninterrupted):
    """After the first all begin again, at once; after the second the other host goes on alone."""
    trial, (kept, lost) = Trial(hosts, tmp_path), hosts
    trial.until_step(CUT_AT)
    kept.workers()[0].kill()
    after_worker = trial.until_goes_on(time.monotonic(), POLL + trial.again_seconds)
    assert lost.workers()
    trial.agents[1].kill()
    killed = time.monotonic()
    left = trial.until_gone(lost, FOLLOW)
    went_on = trial.until_goes_on(killed, bound := KEEP_ALIVE + LAST_CALL + POLL + trial.again_seconds)
    assert_ends(trial, [kept], uninterrupted)
    assert trial.said().count("resumed from") == 2
    report(start=trial.start_seconds, after_worker=after_worker, left=left, went_on=went_on, bound=bound)
