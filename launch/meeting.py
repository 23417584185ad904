"""Where the agents of a run on several machines meet, and how long they wait for one that is gone."""

import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Meeting:
    """From `least` to `most` agents meet at `endpoint` (HOST:PORT) under the name `job`. `host`: whether it is this one's
    machine."""

    endpoint: str
    job: str
    least: int
    most: int
    host: bool

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.endpoint.rsplit(":", 1)
        return host, int(port)


def slurm_meeting(environment: Mapping[str, str] = os.environ) -> Meeting | None:
    """Of the agents of a Slurm step with one task a machine; None outside of one, or on one machine. Raises ValueError for
    more tasks than machines."""
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
    return Meeting(f"{first}:{port}", job, nodes, nodes, host=environment.get("SLURM_NODEID") == "0")


def slurm_hosts(nodes: str) -> list[str]:
    said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return said.stdout.split()


def address_towards(host: str, port: int) -> str:
    """The address under which this machine is seen from `host`: that of the way there. Sends nothing. Raises ValueError
    where the name means nothing here."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"{host}:{port} cannot be reached from here: {error.strerror}") from None


def is_here(host: str, port: int) -> bool:
    """Whether `host` is this machine: only an address of its own can be bound. Raises ValueError."""
    address_towards(host, port)
    for family, kind, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind((target[0], 0))
            return True
    return False


def give_up_after(seconds: float) -> None:
    """Tells the kernel to give up this process's TCP connections once what was sent is unanswered for so long. torch's
    store sets no bound, and the kernel's own is a quarter of an hour. To be called again for connections made since. (Linux.)"""
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
