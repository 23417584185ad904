"""The way between machines: who knows the token gets through to the store, and nobody else, whatever he sends."""

import contextlib
import datetime
import hashlib
import hmac
import json
import os
import pickle
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from rowwise.launch import gate
from rowwise.launch.gate import LOOPBACK, Porter, Secret, Stranger
from rowwise.launch.rendezvous_backend import store_here

SECRET = Secret("the job", b"known to its machines alone")


class Way:
    """A store behind a gate, and a door to it."""

    def __init__(self, porter: Porter):
        self.porter, self.store = porter, store_here()
        listening = socket.create_server((LOOPBACK, 0))
        self.gate = listening.getsockname()
        porter.keep_gate(listening, self.store.port, SECRET)
        self.door = porter.keep_door(self.gate, SECRET, 5)

    def client(self, port: int | None = None) -> dist.TCPStore:
        return dist.TCPStore(LOOPBACK, port or self.door, timeout=datetime.timedelta(seconds=20))

    def stranger(self) -> tuple[socket.socket, bytes]:
        """A connection, and the gate's challenge."""
        one = socket.create_connection(self.gate, timeout=20)
        return one, bytes.fromhex(json.loads(_line(one))["challenge"])


def _line(one: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"\n"):
        more = one.recv(1)
        if not more:
            return said
        said += more
    return said


@pytest.fixture
def way() -> Iterator[Way]:
    porter = Porter()
    yield Way(porter)
    porter.close()


def test_the_store_is_reached_through_door_and_gate(way):
    ours = way.client()
    ours.set("word", "x" * 300_000)  # of many frames
    assert way.store.get("word") == ours.get("word") == b"x" * 300_000
    others = [way.client() for _ in range(5)]
    waiting = threading.Thread(target=lambda: others[0].set("heard", ours.get("late")))
    waiting.start()
    assert [other.add("count", 1) for other in others] == [1, 2, 3, 4, 5], "one that waits keeps none waiting"
    others[1].set("late", "yes")
    waiting.join(20)
    assert way.store.get("heard") == b"yes"


@pytest.mark.parametrize(
    "other", [Secret("the job", b"another token"), Secret("another job", SECRET.token)], ids=["token", "job"]
)
def test_who_has_another_token_or_job_is_told_so_at_once(way, other):
    with pytest.raises(Stranger, match="its token, or its job, is another"):
        way.porter.keep_door(way.gate, other, 60)


def test_a_gate_that_does_not_know_the_token_is_not_entered():
    """Its answer to the challenge is what the door itself has said: a mirror."""
    listening, porter = socket.create_server((LOOPBACK, 0)), Porter()

    def mirror() -> None:
        one, _ = listening.accept()
        one.sendall(json.dumps({"challenge": bytes(32).hex()}).encode() + b"\n")
        one.sendall(json.dumps({"proof": json.loads(_line(one))["proof"]}).encode() + b"\n")

    threading.Thread(target=mirror, daemon=True).start()
    with pytest.raises(Stranger):
        porter.keep_door(listening.getsockname(), SECRET, 5)
    porter.close()


def test_a_gate_that_comes_late_is_waited_for():
    porter, store = Porter(), store_here()
    with socket.create_server((LOOPBACK, 0)) as probe:
        address = probe.getsockname()
    late = threading.Timer(0.5, lambda: porter.keep_gate(socket.create_server(address), store.port, SECRET))
    late.start()
    door = porter.keep_door(address, SECRET, 20)
    late.join()
    dist.TCPStore(LOOPBACK, door).set("here", "yes")
    assert store.get("here") == b"yes"
    with pytest.raises(OSError):
        porter.keep_door((LOOPBACK, 1), SECRET, 0)
    porter.close()


class Touches:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


STRANGERS: dict[str, Callable[[bytes, Path], bytes]] = {
    "garbage": lambda challenge, proof: os.urandom(9000),
    "a line without an end": lambda challenge, proof: b"{" * 200_000,
    "deep JSON": lambda challenge, proof: b"[" * 60_000 + b"\n",
    "a pickle": lambda challenge, proof: pickle.dumps(Touches(proof)) + b"\n",
    "a query to the store": lambda challenge, proof: b"\x00" + struct.pack("!Q", 4) + b"word\n",
    "numbers": lambda challenge, proof: b'{"challenge": 1, "proof": 2}\n',
    "too little": lambda challenge, proof: b'{"challenge": ""}\n',
    "a guess": lambda challenge, proof: _greeting(bytes(32), bytes(32)),
    "the wrong token": lambda challenge, proof: _proven(Secret("the job", b"a wrong one"), challenge),
    "no token": lambda challenge, proof: _proven(Secret("the job", b""), challenge),
    "the gate's own role": lambda challenge, proof: _greeting(bytes(32), SECRET.sign("gate", challenge, bytes(32))),
    "half a greeting": lambda challenge, proof: _proven(SECRET, challenge)[:100],
}


def _greeting(challenge: bytes, proof: bytes) -> bytes:
    return json.dumps({"challenge": challenge.hex(), "proof": proof.hex()}).encode() + b"\n"


def _proven(secret: Secret, challenge: bytes) -> bytes:
    return _greeting(bytes(32), secret.sign("door", challenge, bytes(32)))


@pytest.mark.parametrize("name", STRANGERS)
def test_no_stranger_comes_through(way, tmp_path, monkeypatch, name):
    monkeypatch.setattr(gate, "GREETING_SECONDS", 0.5)
    ours = way.client()
    stranger, challenge = way.stranger()
    stranger.sendall(STRANGERS[name](challenge, tmp_path / "it-ran"))
    assert ours.add("goes on", 1) == 1, "while it is there"
    stranger.settimeout(60)
    try:
        said = b"".join(iter(lambda: stranger.recv(4096), b""))
    except ConnectionResetError:
        said = b""
    assert said in (b"", b'{"refused": ""}\n'), "it is refused or left alone, and its end comes"
    assert ours.add("goes on", 1) == 2
    assert not (tmp_path / "it-ran").exists() and way.store.num_keys() <= 2


def test_silence_keeps_nobody_out(way, monkeypatch):
    """A client that waited for one of them would give up before that one is sent away."""
    monkeypatch.setattr(gate, "GREETING_SECONDS", 60.0)
    silent = [socket.create_connection(way.gate, timeout=20) for _ in range(64)]
    assert way.client().add("here", 1) == 1
    assert len(silent) == 64 and all(_is_open(one) for one in silent), "it is let in while all of them are there"
    for one in silent:
        one.close()


def _is_open(one: socket.socket) -> bool:
    """Whether the other side has not ended it; what it says is the challenge."""
    one.settimeout(0)
    try:
        while said := one.recv(4096):
            assert b"challenge" in said
    except BlockingIOError:
        return True
    return False


def test_silence_ends(way, monkeypatch):
    """By itself, or where others come who are too many."""
    monkeypatch.setattr(gate, "GREETING_SECONDS", 0.5)
    monkeypatch.setattr(gate, "STRANGERS", 64)
    for one in [socket.create_connection(way.gate, timeout=60) for _ in range(2 * gate.STRANGERS)]:
        with contextlib.suppress(ConnectionResetError), one:
            while one.recv(4096):
                pass


def test_however_fast_strangers_come_few_are_there(way, monkeypatch):
    """Else they take the descriptors of the agent, which then cannot look after its workers."""
    monkeypatch.setattr(gate, "STRANGERS", 64)

    def held() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    strangers, before = [], held()
    for _ in range(6):  # as many at once as the kernel keeps waiting
        for _ in range(90):
            strangers.append(socket.socket())
            strangers[-1].setblocking(False)
            strangers[-1].connect_ex(way.gate)
        time.sleep(0.05)
    assert way.client().add("here", 1) == 1
    assert held() - before - len(strangers) < 2 * gate.STRANGERS
    for one in strangers:
        one.close()


def test_the_workers_of_many_machines_find_room():
    """More processes than a limit of open files that is common has room for."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        gate.allow_open_files()
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised[1] == before[1] and 512 < raised[0] <= before[1]
        gate.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == raised
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Between:
    """Sits on the line between door and gate and can change what crosses."""

    def __init__(self, way: Way):
        self.listening = socket.create_server((LOOPBACK, 0))
        self.address, self._way = self.listening.getsockname(), way
        self.change: Callable[[bytes], bytes] = lambda frame: frame
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            door, _ = self.listening.accept()
            out = socket.create_connection(self._way.gate)
            threading.Thread(target=self._pass, args=(out, door, lambda frame: frame), daemon=True).start()
            threading.Thread(target=self._pass, args=(door, out, lambda frame: self.change(frame)), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        try:
            while more := source.recv(1 << 16):
                target.sendall(change(more))
        except OSError:
            pass
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _flip(frame: bytes) -> bytes:
    return frame[:6] + bytes([frame[6] ^ 1]) + frame[7:]


@pytest.mark.parametrize("change", [_flip, lambda f: f + f], ids=["changed", "replayed"])
def test_what_crosses_cannot_be_changed(way, change):
    between = Between(way)
    victim = way.client(way.porter.keep_door(between.address, SECRET, 5))
    assert victim.add("sum", 1) == 1
    between.change = change
    with pytest.raises(RuntimeError):
        for _ in range(100):
            victim.add("sum", 1)
    assert int(way.store.get("sum")) <= 2, "a frame counts once, or not at all"
    assert way.client().add("others", 1) == 1


def test_half_a_message_keeps_nobody_else_waiting(way):
    between = Between(way)
    victim = way.client(way.porter.keep_door(between.address, SECRET, 5))
    between.change = lambda frame: frame[:-1]

    def wait() -> None:
        with pytest.raises(RuntimeError):
            victim.add("sum", 1)

    waiting = threading.Thread(target=wait)
    waiting.start()
    others = way.client()
    assert [others.add("others", 1) for _ in range(3)] == [1, 2, 3] and not way.store.check(["sum"])
    assert waiting.is_alive()
    way.porter.close_connections()
    waiting.join(20)


def test_a_greeting_heard_once_opens_nothing_later(way):
    first, challenge = way.stranger()
    greeting = _proven(SECRET, challenge)
    first.sendall(greeting)
    assert b"proof" in _line(first)
    second, _ = way.stranger()
    second.sendall(greeting)
    assert _line(second) == b'{"refused": ""}\n'
    for one in (first, second):
        one.close()


def test_the_proof_is_what_it_is_said_to_be():
    said = b"".join(struct.pack("!I", len(w)) + w for w in (b"door", b"the job", b"C" * 32, b"D" * 32))
    assert SECRET.sign("door", b"C" * 32, b"D" * 32) == hmac.new(SECRET.token, said, hashlib.sha256).digest()
    assert SECRET.token.decode() not in repr(SECRET)
