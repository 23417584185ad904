"""Strangers on the network: a run on one machine cannot be reached, one that meets others answers who knows its token."""

import contextlib
import os
import pickle
import socket
import struct
import sys
import time
from pathlib import Path

import psutil
import pytest

from commands import await_steps, free_port, overrides_of, run, start
from rowwise.launch.gate import LOOPBACK, Secret
from rowwise.launch.outcome import Outcome, read_outcome
from rowwise.trainer.metrics import read_metrics

pytestmark = pytest.mark.long
TRAIN = [sys.executable, "-P", "-m", "rowwise.launch.start"]
ENDLESS = ["steps=1000000", "schedule=constant", "schedule.warmup_steps=0"]


class Touches:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def family(job) -> list[psutil.Process]:
    agent = psutil.Process(job.pid)
    return [agent, *agent.children(recursive=True)]


def listening(job) -> set[tuple[str, int]]:
    """Addresses and ports on which a run can be reached, over TCP or UDP."""
    found = set()
    for process in family(job):
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM:
                    found.add((one.laddr.ip, one.laddr.port))
    return found


def test_a_run_on_one_machine_listens_on_its_loopback_alone(tmp_path, monkeypatch):
    """The store, gloo and the agent; also where the environment would have gloo elsewhere. It leaves no temporary file."""
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    elsewhere = next((name for name in psutil.net_if_addrs() if name != "lo"), None)
    if elsewhere is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", elsewhere)
    job = start(tmp_path, [*TRAIN, *overrides_of(tmp_path, *ENDLESS, "nproc=2")])
    await_steps(tmp_path, 2, job)
    reachable = listening(job)
    assert len(reachable) >= 3, "one of the agent, and gloo's of each worker"
    assert {address for address, _ in reachable} <= {LOOPBACK, "::ffff:127.0.0.1", "::1"}
    for process in family(job)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert all(one.laddr.ip.removeprefix("::ffff:") == LOOPBACK for one in process.net_connections("inet"))
    job.terminate()
    assert job.wait(60) == 0
    ours = [
        path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")
    ]  # made where it is imported
    assert not ours


def test_strangers_at_the_port_of_a_run_that_meets_others(tmp_path):
    """Everything at once, while the run trains: nothing runs, and the run goes on to its end."""
    token, proof, port = tmp_path / "token", tmp_path / "it-ran", free_port()
    token.touch(0o600)
    token.write_text("of this job and of no other")
    rendezvous = ["--rendezvous", f"{LOOPBACK}:{port}", "--token", str(token)]
    job = start(tmp_path, [*TRAIN, *rendezvous, *overrides_of(tmp_path, "steps=60", "nproc=2")])
    await_steps(tmp_path, 1, job)
    assert {address for address, open_port in listening(job) if open_port != port} <= {LOOPBACK, "::ffff:127.0.0.1"}
    wrong = Secret("rowwise", b"another token of that length")
    greeting = b'{"challenge": "%s", "proof": "%s"}\n' % (
        b"00" * 32,
        wrong.sign("door", bytes(32), bytes(32)).hex().encode(),
    )
    evil = pickle.dumps(Touches(proof))
    state = b"torch.rendezvous.rowwise"
    to_store = b"\x00" + struct.pack("!Q", len(state)) + state + struct.pack("!Q", len(evil)) + evil
    said = [
        b"",
        b"\x00",
        os.urandom(5000),
        evil,
        to_store,
        greeting,
        greeting[:70],
        b"[" * 9000,
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    open_still = []
    while job.poll() is None and len(read_metrics(tmp_path / "run")) < 55:
        for words in said:
            with contextlib.suppress(OSError):
                one = socket.create_connection((LOOPBACK, port), timeout=1)
                one.sendall(words)
                open_still.append(one)
        for one in open_still[:-400]:
            one.close()
        time.sleep(0.05)
    assert len(open_still) >= 3 * len(said)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    assert read_outcome(tmp_path / "run") == Outcome("complete", None, 60)
    assert not proof.exists()


def test_a_machine_with_another_token_is_refused_and_the_meeting_goes_on(tmp_path):
    """A gate that is there, and a second command which does not know its token."""
    port, tokens = free_port(), [tmp_path / "token", tmp_path / "other"]
    for number, token in enumerate(tokens):
        token.touch(0o600)
        token.write_text(f"the token of number {number}")
    overrides = overrides_of(tmp_path, *ENDLESS, "nproc=1")
    rendezvous = ["--rendezvous", f"{LOOPBACK}:{port}", "--token"]
    job = start(tmp_path, [*TRAIN, *rendezvous, str(tokens[0]), *overrides])
    await_steps(tmp_path, 1, job)
    # The stranger believes that the rendezvous is elsewhere, as it would be.
    program = (
        "import sys; from rowwise.launch import rendezvous, start; rendezvous.is_here = lambda *_: False; "
        "sys.exit(start.main(sys.argv[1:]))"
    )
    other = [*rendezvous, str(tokens[1]), *overrides, f"run_dir={tmp_path}/other-run"]
    code, said = run(tmp_path, [sys.executable, "-c", program, *other])
    assert code == 2
    told = f"refused: no rendezvous at {LOOPBACK}:{port}: its token, or its job, is another; give the same --token and --job on "
    assert said == f"{told}each machine\n"
    job.terminate()
    assert job.wait(60) == 0
