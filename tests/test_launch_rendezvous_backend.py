"""How machines meet: where they listen, what they keep in the store, and the token that they must know."""

import datetime
import json
import os
import pickle
import socket
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousStateError

from rowwise.launch import gate
from rowwise.launch.gate import LOOPBACK
from rowwise.launch.outcome import Failed
from rowwise.launch.rendezvous import TOKEN, Rendezvous, token_of
from rowwise.launch.rendezvous_backend import Backend, _listen, decoded, encoded, rendezvous_handler, store_here
from rowwise.launch.torch_elastic import NodeDesc, RendezvousState


class Touches:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("address", [LOOPBACK, *(["::1"] if socket.has_dualstack_ipv6() else [])])
def test_where_the_machines_meet_at_a_name_every_address_is_listened_on(address):
    with _listen(_rendezvous("localhost", 0)) as listening:
        socket.create_connection((address, listening.getsockname()[1]), timeout=20).close()
    with _listen(_rendezvous(LOOPBACK, 0)) as listening:
        assert listening.getsockname()[0] == LOOPBACK


def _rendezvous(host: str, port: int) -> Rendezvous:
    return Rendezvous(f"{host}:{port}", "the job", 1, 1, host=False, token=b"known to its machines alone")


def test_who_is_met_by_silence_is_told_so_in_a_line(monkeypatch):
    monkeypatch.setattr(gate, "GREETING_SECONDS", 0.1)
    with socket.create_server((LOOPBACK, 0)) as silent:
        met = _rendezvous(LOOPBACK, silent.getsockname()[1])
        with (
            pytest.raises(Failed, match=f"^no rendezvous at {met.endpoint}: TimeoutError$"),
            rendezvous_handler(met, 0),
        ):
            pass


def test_the_state_of_a_meeting_is_json(tmp_path):
    state, machine = RendezvousState(), NodeDesc("host", 17, 0)
    now = datetime.datetime.now(datetime.UTC)
    state.round, state.participants, state.wait_list, state.deadline = 3, {machine: 0}, {NodeDesc("other", 1, 2)}, now
    state.last_heartbeats = {machine: now}
    store = store_here()
    backend, other = Backend(store, "job"), Backend(store, "job")
    assert backend.get_state() is None
    written = backend.set_state(pickle.dumps(state))
    assert written is not None and written[2]
    json.loads(store.get("rendezvous/job"))
    read = other.get_state()
    assert read is not None and vars(pickle.loads(read[0])) == vars(state)
    stale = other.set_state(pickle.dumps(RendezvousState()))
    assert stale is not None and not stale[2] and vars(pickle.loads(stale[0])) == vars(state)
    state.round = 4
    newer = other.set_state(pickle.dumps(state), read[1])
    assert newer is not None and newer[2]

    for evil in (
        pickle.dumps(Touches(tmp_path / "it-ran")),
        b"[1]",
        b'{"round": ["eval", "1"]}',
        b'["map", [[["set", []], 1]]]',
    ):
        store.set("rendezvous/job", evil)
        with pytest.raises(RendezvousStateError, match="is not this job's"):
            backend.get_state()
    assert not (tmp_path / "it-ran").exists()
    assert decoded(encoded({"a": {machine}, "b": None})) == {"a": {machine}, "b": None}
    with pytest.raises(TypeError, match="a Touches has no place"):
        encoded(Touches(tmp_path))


def test_a_token_is_of_a_file_for_its_owner_or_of_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o640)
    with pytest.raises(ValueError, match="others can read or change it; give chmod 600"):
        token_of(file, "", {})
    file.chmod(0o600)
    assert token_of(file, "", {TOKEN: "another"}) == b"0123456789abcdef"
    assert token_of(None, "", {TOKEN: "0123456789abcdef"}) == b"0123456789abcdef"
    file.write_text("short")
    for path, environment in ((file, {}), (None, {TOKEN: "short"})):
        with pytest.raises(ValueError, match="has 5 characters, which can be guessed; make one"):
            token_of(path, "", environment)
    with pytest.raises(ValueError, match=r"--token /no/where: No such file .*; make one with"):
        token_of(Path("/no/where"), "", {})
    with pytest.raises(ValueError, match=r"^--nodes 2: machines that meet prove to each other .* make a token"):
        token_of(None, "--nodes 2", {})
