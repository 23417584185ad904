"""A real Slurm for tests: one controller and two nodes on this machine, in a folder of their own, gone afterwards.

The nodes are called 127.0.0.1 and 127.0.0.2, names that resolve without anything being changed. As root only: a node's
daemon starts the jobs of others.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2")
START_SECONDS = 120
GRACE_SECONDS = 30
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
# A requeued job waits until its credential has expired: 120 seconds by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
FirstJobId={first_job}
KillWait=5
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname=localhost Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname=localhost Port={ports[2]} CPUs=2
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_seconds}
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """A running Slurm. `environment` is what its commands need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Returns once both nodes take jobs. Raises RuntimeError with what the daemon at fault has said."""
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        ports = _free_ports(3)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            ports=ports,
            nodes=NODES,
            first_job=random.randrange(1, 10000),  # runs meet at a port of that number
            grace_seconds=GRACE_SECONDS,
        )
        (self.folder / "slurm.conf").write_text(text)
        files = [f"--{key}-file={self.folder}/munge.{key}" for key in ("key", "pid", "seed")]
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        self._await_nodes()

    def _daemon(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        # In a session of its own: a Ctrl-C to the tests is theirs, and they stop the daemons in order.
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%T", check=False).split() != ["idle"] * len(NODES):
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"Slurm does not start; ended: {ended or 'none'}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The end of what each daemon has said."""
        return "\n".join(
            f"== {log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for log in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        """Ends the jobs, the daemons and whatever of theirs is left."""
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in self._daemons:
            daemon.wait()

    def processes(self) -> list[psutil.Process]:
        """Daemons, steps and jobs of this cluster that are alive."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.is_running()
        except psutil.Error:
            return False

    def run(self, *command: str, check: bool = True) -> str:
        """A command of Slurm; what it said. Raises RuntimeError with the daemons' logs where it fails."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """The job's id."""
        return self.run("sbatch", "--parsable", f"--chdir={script.parent}", *options, str(script))

    def shown(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, or of a task of an array (ID_TASK)."""
        said = self.run("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def await_state(self, job: str, *states: str, seconds: float = 600, restarts: int = 0) -> dict[str, str]:
        """What is shown of the job once it is in one of `states` after that many restarts. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (shown := self.shown(job))["JobState"] not in states or int(shown["Restarts"]) < restarts:
            if time.monotonic() > deadline:
                said = Path(shown["StdOut"]).read_text()[-4000:] if Path(shown["StdOut"]).is_file() else ""
                raise TimeoutError(
                    f"job {job} is {shown['JobState']} ({shown['Reason']}) after {shown['Restarts']} restarts, not "
                    f"{' or '.join(states)} after {restarts}; it said:\n{said}\n{self.logs()}"
                )
            time.sleep(0.1)
        return shown


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Raises RuntimeError where Slurm is not installed, does not start, or leaves a process behind."""
    missing = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise RuntimeError(f"{', '.join(missing) or 'root'} is missing: these tests need slurm-wlm and munge, and root")
    # Not pytest's folder: the name of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
        if left := cluster.processes():
            raise RuntimeError(f"Slurm left processes behind: {left}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
