"""How the agents of a run on several machines meet, and where their workers do: in a store that only they can reach.

It listens on the loopback of the first machine, and the others come through launch.gate. torch's own rendezvous keeps its
state as a pickle, which every agent would unpickle: here it is JSON.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import pickle
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from rowwise.launch.gate import LOOPBACK, Porter, Stranger
from rowwise.launch.outcome import Failed, Refused
from rowwise.launch.rendezvous import START, Rendezvous
from rowwise.launch.torch_elastic import (
    DynamicRendezvousHandler,
    NodeDesc,
    RendezvousBackend,
    RendezvousState,
    RendezvousTimeout,
)
from rowwise.launch.workers import store_here

BACKEND = "rowwise"
LAST_CALL = datetime.timedelta(seconds=10)  # for further machines, once the least number is there
_NOTHING = "null"


def settings(make: Callable[[RendezvousParameters], RendezvousHandler]) -> dict[str, Any]:
    """Returns the settings of torch's LaunchConfig for a handler that `make` makes."""
    rendezvous_handler_registry.register(BACKEND, _made)
    return {"rdzv_backend": BACKEND, "rdzv_configs": {"make": make}}


def _made(parameters: RendezvousParameters) -> RendezvousHandler:
    return parameters.config["make"](parameters)


@contextlib.contextmanager
def rendezvous_handler(
    rendezvous: Rendezvous, patience_seconds: float
) -> Iterator[Callable[[RendezvousParameters], RendezvousHandler]]:
    """Gives what makes the handler of a run. The rendezvous lasts as long as the context of its host.

    Raises Refused where the port of the rendezvous cannot be had, or who answers there has another token, and Failed where
    nobody does.
    """
    before = os.environ.get(START)
    porter = Porter()
    try:
        store = store_here() if rendezvous.host else None
        if store is not None:
            porter.keep_gate(_listen(rendezvous), store.port, rendezvous.secret)
        with _said_in_a_line(rendezvous):
            port = porter.keep_door(rendezvous.address, rendezvous.secret, patience_seconds)
        yield lambda parameters: met(parameters, port, patience_seconds)
    finally:
        porter.close()
        os.environ.pop(START, None)
        if before is not None:
            os.environ[START] = before


def _listen(rendezvous: Rendezvous) -> socket.socket:
    """On the address that was given, or, since a name can mean another one here than elsewhere, on every address."""
    host, port = rendezvous.address
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        address = ""
    every = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if every or ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, dualstack_ipv6=every)
    except OSError as error:
        raise Refused(
            f"{rendezvous.endpoint} cannot be listened on ({os.strerror(error.errno or 0)}); give another port"
        ) from None


@contextlib.contextmanager
def _said_in_a_line(rendezvous: Rendezvous) -> Iterator[None]:
    try:
        yield
    except Stranger as error:
        raise Refused(
            f"no rendezvous at {rendezvous.endpoint}: {error}; give the same --token and --job on each machine"
        ) from None
    except (OSError, EOFError) as error:
        raise Failed(f"no rendezvous at {rendezvous.endpoint}: {str(error) or type(error).__name__}") from None


class Together(DynamicRendezvousHandler):
    """The rendezvous of several machines, as torch has it; the workers of each reach the one store through its door."""

    door: int

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        info = super().next_rendezvous()
        # Of this start alone: in the store is also what those before have left.
        os.environ[START] = info.store.compare_set("start", "", uuid.uuid4().hex).decode()
        return RendezvousInfo(info.store, info.rank, info.world_size, RendezvousStoreInfo(LOOPBACK, self.door))


def met(parameters: RendezvousParameters, door: int, patience_seconds: float) -> Together:
    """Makes the handler of an agent whose way to the store is `door`."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch makes no store of its own
    store = dist.TCPStore(LOOPBACK, door, timeout=datetime.timedelta(seconds=patience_seconds))
    handler = Together.from_backend(
        parameters.run_id,
        store,
        Backend(store, parameters.run_id),
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(last_call=LAST_CALL),
    )
    handler.door = door
    return handler


class Backend(RendezvousBackend):
    """Keeps the state of a rendezvous in the store as JSON. A token of torch's is the JSON that was read."""

    def __init__(self, store: dist.Store, job: str):
        self._store, self._key = store, f"rendezvous/{job}"
        self._exchange("", _NOTHING)

    @property
    def name(self) -> str:
        return BACKEND

    def get_state(self) -> tuple[bytes, Any] | None:
        return self._read(self._call(self._store.get, self._key))

    def set_state(self, state: bytes, token: Any = None) -> tuple[bytes, Any, bool] | None:
        ours = json.dumps(encoded(vars(pickle.loads(state))), sort_keys=True)  # of this very process
        there = self._exchange(token or _NOTHING, ours)
        found = self._read(there)
        return None if found is None else (*found, there.decode() == ours)

    def _exchange(self, expected: str, desired: str) -> bytes:
        return self._call(self._store.compare_set, self._key, expected, desired)

    def _call(self, function: Callable[..., bytes], *arguments: str) -> bytes:
        try:
            return function(*arguments)
        except (ValueError, RuntimeError, TimeoutError) as error:
            raise RendezvousConnectionError(f"the store of the rendezvous does not answer: {error}") from None

    def _read(self, there: bytes) -> tuple[bytes, str] | None:
        if there == _NOTHING.encode():
            return None
        state = RendezvousState()
        try:
            told = decoded(json.loads(there))
            for name in vars(state):
                setattr(state, name, told[name])
        except Exception as error:  # of the many that what is not ours can cause
            raise RendezvousStateError(f"the state of the rendezvous is not this job's: {error!r}") from None
        return pickle.dumps(state), there.decode()


def encoded(value: Any) -> Any:
    """Returns a state of torch's rendezvous as plain JSON. Raises TypeError for anything else.

    Machines, times, sets and maps are pairs of what they are and what is in them.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, datetime.datetime):
        return ["time", value.isoformat()]
    if isinstance(value, NodeDesc):
        return ["machine", [value.addr, value.pid, value.local_id]]
    if isinstance(value, set):
        return ["set", sorted((encoded(one) for one in value), key=json.dumps)]
    if isinstance(value, dict):
        return ["map", sorted(([encoded(key), encoded(one)] for key, one in value.items()), key=json.dumps)]
    raise TypeError(f"a {type(value).__name__} has no place in the state of a rendezvous")


def decoded(tree: Any) -> Any:
    """Returns what `encoded` was given. Raises TypeError, ValueError or KeyError for anything that it does not write."""
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    kind, inside = tree
    made: dict[str, Callable[[], Any]] = {
        "time": lambda: datetime.datetime.fromisoformat(inside),
        "machine": lambda: NodeDesc(str(inside[0]), int(inside[1]), int(inside[2])),
        "set": lambda: {decoded(one) for one in inside},
        "map": lambda: {decoded(key): decoded(one) for key, one in inside},
    }
    return made[kind]()
