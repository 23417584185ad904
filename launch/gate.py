"""A guarded way between machines: who does not know the token of the job is let in nowhere.

torch's store asks nobody who he is. So it listens on its own machine alone, and the machines of a run reach it through

    agent, worker -> door (127.0.0.1) ===== gate (the port where they meet) -> store (127.0.0.1)

Door and gate greet each other with a line of JSON each, and both prove that they know the token without saying it; the door
knows then that it is at the right gate, too:

    gate    {"challenge": C}
    door    {"challenge": D, "proof": HMAC-SHA256(token, "door", job, C, D)}
    gate    {"proof": HMAC-SHA256(token, "gate", job, C, D)}            or {"refused": ""}

What follows are frames: a length of 4 bytes, as many bytes, and their HMAC-SHA256 with their number under a key of this
connection and direction. One that was changed, repeated or left out ends the connection. Nothing is encrypted.
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import json
import resource
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

LOOPBACK = "127.0.0.1"
GREETING_SECONDS = 10.0  # that a connection has to prove itself
STRANGERS = 256  # connections that have not yet: of more, the oldest goes, and one of ours comes again
OPEN_FILES = 1 << 16  # that a gate may have: two for each connection, and the store behind it one more
RETRY_SECONDS = 0.3
_REFUSED = b'{"refused": ""}\n'
_FRAME_BYTES, _MAC_BYTES = 1 << 16, hashlib.sha256().digest_size

Result = TypeVar("Result")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Stranger(ConnectionError):
    """The other side does not know the token of the job, or is no part of it."""


@dataclass(frozen=True)
class Secret:
    """The token of a job, and the job's name, which two jobs of one token differ in."""

    job: str
    token: bytes = field(repr=False)

    def sign(self, role: str, *words: bytes) -> bytes:
        said = [role.encode(), self.job.encode(), *words]
        return _mac(self.token, *(struct.pack("!I", len(word)) + word for word in said))


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), hashlib.sha256)


@dataclass(frozen=True)
class Keys:
    """The keys of one connection, one a direction."""

    to_gate: bytes = field(repr=False)
    to_door: bytes = field(repr=False)


class Porter:
    """A thread that keeps gates and doors until it is closed."""

    def __init__(self) -> None:
        self._loop, self._servers = asyncio.new_event_loop(), list[asyncio.Server]()
        self._thread = threading.Thread(target=self._loop.run_forever, name="porter", daemon=True)
        self._thread.start()

    def keep_gate(self, listening: socket.socket, store_port: int, secret: Secret) -> None:
        """Lets whoever knows `secret` through to the store, from now until it is closed."""
        allow_open_files()
        self._keep(Gate(store_port, secret).receive, listening)

    def keep_door(self, gate: tuple[str, int], secret: Secret, patience_seconds: float) -> int:
        """Opens a way to `gate` for the processes of this machine, and returns its port on the loopback.

        Raises Stranger where one of the two does not know the other's token, and OSError or EOFError where nothing answers
        for `patience_seconds`.
        """
        self._run(knock(gate, secret, patience_seconds))
        listening = socket.create_server((LOOPBACK, 0))
        port = listening.getsockname()[1]
        self._keep(Door(gate, secret, patience_seconds).receive, listening)
        return port

    def _keep(self, receive: Callable[..., Coroutine[Any, Any, None]], listening: socket.socket) -> None:
        self._servers.append(self._run(asyncio.start_server(receive, sock=listening)))

    def _run(self, what: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def close_connections(self) -> None:
        """Ends the connections that there are; others may come."""
        self._run(_end_others())

    def close(self) -> None:
        """Ends gates, doors, connections and the thread."""
        for server in self._servers:
            self._loop.call_soon_threadsafe(server.close)
        self.close_connections()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def allow_open_files() -> None:
    """Raises this process's limit of open files, which is often 1,024: too few for the workers of many machines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _end_others() -> None:
    while others := asyncio.all_tasks() - {asyncio.current_task()}:  # what is being accepted becomes one more
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Gate:
    """Stands before the store, and lets in who knows the secret."""

    def __init__(self, store_port: int, secret: Secret):
        self._store_port, self._secret = store_port, secret
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # in the order in which they came

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._strangers[writer] = None
        if len(self._strangers) > STRANGERS:
            # Taken out here, for its own end comes later: until then each of many would end this same one.
            self._strangers.pop(oldest := next(iter(self._strangers)))
            oldest.transport.abort()
        with _closing(writer):
            try:
                async with asyncio.timeout(GREETING_SECONDS):
                    keys = await _admit(reader, writer, self._secret)
            except Stranger:
                writer.write(_REFUSED)
                raise
            finally:
                self._strangers.pop(writer, None)
            inner = await asyncio.open_connection(LOOPBACK, self._store_port)
            with _closing(inner[1]):
                await _relay(inner, (reader, writer), keys.to_door, keys.to_gate)


class Door:
    """Stands before the processes of its machine: each connection of theirs has one of its own to the gate."""

    def __init__(self, gate: tuple[str, int], secret: Secret, patience_seconds: float):
        self._gate, self._secret, self._patience = gate, secret, patience_seconds

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with _closing(writer):
            outer, keys = await _enter(self._gate, self._secret, self._patience)
            with _closing(outer[1]):
                await _relay((reader, writer), outer, keys.to_gate, keys.to_door)


@contextlib.contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    """The end of a connection, whatever ends it: who it was sees that, and nobody else."""
    try:
        with contextlib.suppress(OSError, EOFError, ValueError, asyncio.CancelledError):
            yield
    finally:
        writer.close()


async def knock(gate: tuple[str, int], secret: Secret, patience_seconds: float) -> None:
    """Goes in and out again. Raises Stranger, or OSError or EOFError."""
    (_, writer), _ = await _enter(gate, secret, patience_seconds)
    writer.close()


async def _enter(gate: tuple[str, int], secret: Secret, patience_seconds: float) -> tuple[Streams, Keys]:
    """A connection that the gate has let in. It may not stand yet, so others are tried for a while."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_seconds
    while True:
        writer = None
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                reader, writer = await asyncio.open_connection(*gate)
                return (reader, writer), await _introduce(reader, writer, secret)
        except (OSError, EOFError) as error:  # TimeoutError is one
            if writer is not None:
                writer.close()
            if isinstance(error, Stranger) or loop.time() > deadline:
                raise
        await asyncio.sleep(RETRY_SECONDS)


async def _admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: Secret) -> Keys:
    """The gate's side of the greeting. Raises Stranger."""
    ours = secrets.token_bytes(32)
    _say(writer, challenge=ours)
    theirs, proof = await _hear(reader, "challenge", "proof")
    _check(proof, secret.sign("door", ours, theirs))
    _say(writer, proof=secret.sign("gate", ours, theirs))
    return Keys(secret.sign("to gate", ours, theirs), secret.sign("to door", ours, theirs))


async def _introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: Secret) -> Keys:
    """The door's side. Raises Stranger where the gate does not know the token, or does not know ours."""
    (theirs,) = await _hear(reader, "challenge")
    ours = secrets.token_bytes(32)
    _say(writer, challenge=ours, proof=secret.sign("door", theirs, ours))
    try:
        (proof,) = await _hear(reader, "proof")
    except Stranger:
        raise Stranger("its token, or its job, is another") from None
    _check(proof, secret.sign("gate", theirs, ours))
    return Keys(secret.sign("to gate", theirs, ours), secret.sign("to door", theirs, ours))


def _say(writer: asyncio.StreamWriter, **words: bytes) -> None:
    writer.write(json.dumps({key: word.hex() for key, word in words.items()}).encode() + b"\n")


async def _hear(reader: asyncio.StreamReader, *keys: str) -> list[bytes]:
    """A line with these words. Raises Stranger for any other, and EOFError where it ends before."""
    try:
        words = json.loads(await reader.readuntil(b"\n"))
        told = [bytes.fromhex(words.pop(key)) for key in keys]
    except EOFError:
        raise
    except Exception:  # of the many that a stranger can cause
        raise Stranger("it does not greet as a part of this job does") from None
    if words or any(len(word) != _MAC_BYTES for word in told):
        raise Stranger("it does not greet as a part of this job does")
    return told


def _check(given: bytes, right: bytes) -> None:
    if not hmac.compare_digest(given, right):
        raise Stranger("it does not know the token of this job")


async def _relay(plain: Streams, sealed: Streams, outward: bytes, inward: bytes) -> None:
    """Passes on what comes on either side until one of them ends."""
    ways = [
        asyncio.create_task(_seal(plain[0], sealed[1], outward)),
        asyncio.create_task(_unseal(sealed[0], plain[1], inward)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _seal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    for number in itertools.count():
        chunk = await reader.read(_FRAME_BYTES)
        if not chunk:
            return
        writer.write(struct.pack("!I", len(chunk)) + chunk + _mac(key, struct.pack("!Q", number), chunk))
        await writer.drain()


async def _unseal(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    for number in itertools.count():
        (length,) = struct.unpack("!I", await reader.readexactly(4))
        if not 0 < length <= _FRAME_BYTES:
            raise Stranger(f"a frame of {length} bytes")
        chunk = await reader.readexactly(length)
        _check(await reader.readexactly(_MAC_BYTES), _mac(key, struct.pack("!Q", number), chunk))
        writer.write(chunk)
        await writer.drain()
