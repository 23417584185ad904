"""Two hosts on one machine: a network namespace each, joined by a switch. Needs root and `ip`.

    host 0 (10.77.0.1, eth0) --- switch (a bridge) --- host 1 (10.77.0.2, eth0)

They share the disk, as the hosts of a cluster share a run directory.
"""

import contextlib
import itertools
import os
import subprocess
from pathlib import Path

import psutil

_NUMBERS = itertools.count()


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Host:
    """A namespace with one interface; the addresses lie inside, so that no two networks meet."""

    def __init__(self, name: str, switch: str, number: int):
        self.name, self.address, self._switch, self._port = name, f"10.77.0.{number + 1}", switch, f"port{number}"
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", self._port, "netns", switch)
        ip("-n", name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        ip("-n", switch, "link", "set", self._port, "up")
        self.mend()

    def cut(self) -> None:
        """Takes the host off the switch. Its interface stays up: what is sent vanishes, and nobody is told."""
        ip("-n", self._switch, "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        ip("-n", self._switch, "link", "set", self._port, "master", "bridge")

    def start(self, arguments: list[str], folder: Path) -> subprocess.Popen:
        """Runs a program on this host; what it says goes to the host's log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        with self.log(folder).open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *arguments],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def run(self, *command: str) -> None:
        """Runs a short command on this host."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True)

    def log(self, folder: Path) -> Path:
        return folder / f"log-{self.address}"

    def processes(self) -> list[psutil.Process]:
        """What runs on this host, zombies apart: what has its namespace, as `ip netns pids` says, which is a process for each look."""
        found, here = [], Path("/run/netns", self.name).stat().st_ino
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                its = Path(f"/proc/{process.pid}/ns/net").stat().st_ino
                if its == here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.processes() if "RANK" in environment_of(p)]

    def kill(self) -> None:
        """What a loss of power does."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        self.kill()
        ip("netns", "delete", self.name)


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.NoSuchProcess:
        return {}


class Network:
    """The hosts and their switch, removed at the end with all that runs there."""

    def __enter__(self) -> list[Host]:
        name = f"rowwise-{os.getpid()}-{next(_NUMBERS)}"
        self._switch, self.hosts = f"{name}-switch", []
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self._switch, "link", "set", "bridge", "up")
            for number in range(2):
                self.hosts.append(Host(f"{name}-{number}", self._switch, number))
        except BaseException:
            self.__exit__()
            raise
        return self.hosts

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.close()
        ip("netns", "delete", self._switch)
