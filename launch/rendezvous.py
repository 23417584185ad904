"""Where the agents of a run on several machines meet, what they must know there, and how long they wait for one that is gone."""

import argparse
import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rowwise.launch.gate import Secret
from rowwise.trainer.files import full_path

TOKEN = "ROWWISE_TOKEN"
LOGGED = "ROWWISE_WORKERS_LOGGED"  # our own agent's: it keeps what each worker says, where --log-dir has it
START = "ROWWISE_START"  # our own agent's name for this start of the workers, on every machine
LEAST_BYTES = 16
LAST_PORT = 65535
MAKE_ONE = "(umask 077; head -c 32 /dev/urandom | base64 > FILE)"


@dataclass(frozen=True)
class Rendezvous:
    """From `least` to `most` agents meet at `endpoint` (HOST:PORT) under the name `job`, and know `token`.

    `host`: whether it is this one's machine.
    """

    endpoint: str
    job: str
    least: int
    most: int
    host: bool
    token: bytes = field(repr=False)

    @property
    def secret(self) -> Secret:
        return Secret(self.job, self.token)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.endpoint.rsplit(":", 1)
        return host, int(port)


def slurm_rendezvous(token: Path | None = None, environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """Returns the rendezvous of the agents of a Slurm step with one task a machine; None outside of one, or on one machine.

    Raises ValueError for more tasks than machines, and without a token.
    """
    nodes, tasks = (int(environment.get(f"SLURM_STEP_NUM_{what}", 1)) for what in ("NODES", "TASKS"))
    if nodes == tasks == 1:
        return None
    if tasks != nodes:
        raise ValueError(
            f"{tasks} tasks on {nodes} machines: a run is one task a machine, which starts nproc= workers; give Slurm "
            "--ntasks-per-node=1"
        )
    first = slurm_hosts(environment["SLURM_STEP_NODELIST"])[0]
    # Jobs that share a machine have neighbouring numbers.
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000
    job = f"slurm-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_STEP_ID', 0)}"
    host = environment.get("SLURM_NODEID") == "0"
    return Rendezvous(f"{first}:{port}", job, nodes, nodes, host, token_of(token, f"{nodes} machines", environment))


def token_of(path: Path | None, given: str, environment: Mapping[str, str] = os.environ) -> bytes:
    """Returns what the machines of a job know and others do not, from a file that nobody else can read, or the environment.

    Raises ValueError; `given` is what asked for it.
    """
    if path is not None:
        return _long_enough(_read_own(path), f"--token {path}")
    if TOKEN in environment:
        return _long_enough(environment[TOKEN].strip().encode(), TOKEN)
    raise ValueError(
        f"{given}: machines that meet prove to each other that they are of this job; make a token with {MAKE_ONE} and "
        f"give --token FILE on each, or set {TOKEN} (rowwise slurm does)"
    )


def _read_own(path: Path) -> bytes:
    try:
        with full_path(str(path), "--token").open("rb") as file:
            told = os.fstat(file.fileno())
            if told.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or told.st_uid != os.geteuid():
                raise ValueError(
                    f"--token {path}: others can read or change it; give chmod 600 {path}, and a new token"
                )
            return file.read(4096).strip()
    except OSError as error:
        raise ValueError(f"--token {path}: {error.strerror}; make one with {MAKE_ONE}") from None


def _long_enough(token: bytes, origin: str) -> bytes:
    if len(token) < LEAST_BYTES:
        raise ValueError(
            f"{origin} has {len(token)} characters, which can be guessed; make one of {LEAST_BYTES} or more with {MAKE_ONE}"
        )
    return token


def slurm_hosts(nodes: str) -> list[str]:
    """Returns the names of the machines in a list of Slurm's. Raises ValueError."""
    try:
        said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            f"scontrol, which names the machines of {nodes}, is not here, or does not answer: give --nodes N and --rendezvous "
            "HOST:PORT"
        ) from None
    return said.stdout.split()


def address_towards(host: str, port: int) -> str:
    """Returns the address under which this machine is seen from `host`: that of the way there. Sends nothing.

    Raises ValueError where the name means nothing here.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be reached from here: {error.strerror}") from None


def is_here(host: str, port: int) -> bool:
    """Says whether `host` is this machine: only an address of its own can be bound. Raises ValueError."""
    address_towards(host, port)
    for family, kind, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind((target[0], 0))
            return True
    return False


def give_up_after(seconds: float) -> None:
    """Tells the kernel to give up this process's TCP connections once what was sent is unanswered for so long. (Linux.)

    torch's store sets no bound, and the kernel's own is a quarter of an hour. To be called again for connections made since.
    """
    for name in Path("/proc/self/fd").iterdir():
        # Another thread may close it meanwhile.
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(name.stat().st_mode):
                _bound(int(name.name), seconds)


def _bound(handle: int, seconds: float) -> None:
    with socket.socket(fileno=os.dup(handle)) as one:
        if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * seconds))


def rendezvous_of(options: argparse.Namespace) -> Rendezvous | None:
    """Returns where this machine meets others: as the command line or Slurm says. Raises ValueError."""
    rendezvous = asked_for(options) if options.nodes or options.rendezvous else slurm_rendezvous(options.token)
    if rendezvous is None and options.token is not None:
        raise ValueError(f"--token {options.token}: of machines that meet; give --rendezvous HOST:PORT too")
    return rendezvous


def asked_for(options: argparse.Namespace) -> Rendezvous | None:
    """Returns the rendezvous of --nodes and --rendezvous; None for one machine alone. Raises ValueError."""
    least, _, most = (options.nodes or "1").partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise ValueError(f"--nodes {options.nodes}: give a number of machines, or MIN:MAX")
    if int(most or least) == 1 and not options.rendezvous:
        return None
    given = f"--rendezvous {options.rendezvous}" if options.rendezvous else f"--nodes {options.nodes}"
    host, _, port = options.rendezvous.rpartition(":")
    if not (host and port.isdecimal() and 1 <= int(port) <= LAST_PORT):
        raise ValueError(
            f"{given}: several machines meet at one of them; give --rendezvous HOST:PORT, the same on each, with a port "
            f"of 1 to {LAST_PORT}"
        )
    token, here = token_of(options.token, given), is_here(host, int(port))
    return Rendezvous(options.rendezvous, options.job or "rowwise", int(least), int(most or least), here, token)


def interfaces() -> dict[str, str]:
    """Returns what tells gloo and NCCL to stay on this machine's loopback; they ask nobody who he is."""
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    return {
        f"{who}_SOCKET_IFNAME": f"{exactly}{name}"
        for name in loopback
        for who, exactly in (("GLOO", ""), ("NCCL", "="))
    }
