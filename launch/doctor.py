"""What this machine has of what runs need, what is amiss, and what mends it. Its output is what a report of a fault needs.

    rowwise doctor                 prints it
    rowwise doctor to=FILE         and writes it to a file

Python, packages, torch and its devices, links between them, compilers, room on the disk of this folder and in shared memory, limits,
locks of this folder's file system, and what two ranks exchange over each backend. Locks and ranks are tried for real, in a folder
that is removed. Names of the machine and of the user are not told.
Exit code 0; 1: something would stop a run ("!"; what would stop an option is marked "-"); 2: the arguments are refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from rowwise.launch import health
from rowwise.launch.backends import PATIENCE_SECONDS, try_backends
from rowwise.launch.health import Finding
from rowwise.launch.settings import parse, read_words
from rowwise.launch.warm import Warm, warmed
from rowwise.trainer.files import write_whole
from rowwise.trainer.screen import is_terminal, width_of, wrapped

TOLD = ("CUDA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "ROWWISE_KERNELS", "PYTHON")
HANGING = 15  # of the lines


@dataclass(frozen=True)
class Settings:
    """The keys of the command. `to`: a file for what is printed."""

    to: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Prints, and returns the exit code."""
    words = read_words("rowwise doctor", __doc__, sys.argv[1:] if arguments is None else arguments)
    try:
        settings = parse(Settings, words, "to=FILE")
        to = _file(settings.to) if settings.to else None
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    findings = examined(Path.cwd())
    lines = [health.without_home(line, str(Path.home())) for line in health.report(findings)]
    for line in lines:
        print("\n".join(_fitted(line)))
    if to is not None:
        write_whole(to, "\n".join(lines) + "\n")
    return int(any(one.state == "amiss" for one in findings))


def _file(name: str) -> Path:
    """Raises ValueError where nothing can be written there."""
    path = Path(name).expanduser()
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"to={name}: give the name of a file, in a folder that is there and that you may write in")
    return path


def _fitted(line: str) -> list[str]:
    """As wide as the terminal; tables of other programs, which begin further in, as they are."""
    if not is_terminal(sys.stdout) or line.startswith(" " * (HANGING + 1)):
        return [line]
    told = line.lstrip(" ")
    indent = len(line) - len(told)
    first, *rest = wrapped(told, width_of(sys.stdout) - 1 - indent, HANGING)
    return [" " * indent + first, *rest]


def examined(folder: Path) -> list[Finding]:
    """Returns what is found of this machine, and of the file system of `folder`."""
    began = time.monotonic()
    with warmed(beforehand=("rowwise.launch.patient",)) as warm:  # which imports torch meanwhile
        findings = [of_rowwise(), of_system(), health.of_python(sys.version_info[:3], of_interpreter())]
        findings += health.of_packages(required_packages())
        torch_findings, gpus = of_torch(warm, began)
        findings += torch_findings + of_links(gpus) + health.of_compilers(compilers(), has_headers(), gpus)
        findings += [of_memory(), *disks(folder), of_shared_memory(gpus), *limits(), try_locks(folder)]
        findings += try_backends(warm, gpus) if not any(one.state == "amiss" for one in torch_findings[:1]) else []
    named = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(TOLD)]
    return [*findings, Finding("variables", " ".join(named) or "none that torch, NCCL or gloo read")]


def of_rowwise() -> Finding:
    return Finding("rowwise", versions_told())


def versions_told() -> str:
    """Returns the versions of what computes, by what is installed: nothing of it is imported."""
    torch = _version("torch")
    return f"rowwise {_version('rowwise')}, torch {torch}, Python {platform.python_version()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def of_system() -> Finding:
    system, cores = f"{platform.system()} {platform.release()} {platform.machine()}", len(os.sched_getaffinity(0))
    return Finding("system", f"{system}, {_processor()}, {cores} cores for this process")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or "unknown processor"


def of_interpreter() -> str:
    library = " ".join(platform.libc_ver()).strip() or "no glibc"
    return f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}, {library}"


def required_packages() -> dict[str, str | None]:
    """Returns what rowwise asks to be installed with it -> its version, None where it is not there."""
    asked = importlib.metadata.requires("rowwise") or []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in asked if "extra ==" not in line]
    return {name: _version(name) for name in names}


def of_torch(warm: Warm, began: float) -> tuple[list[Finding], int]:
    """Returns what torch is and what it sees, and the GPUs that it sees."""
    try:
        told = warm.ask("rowwise.launch.patient:tell_devices", seconds=PATIENCE_SECONDS)
    except TimeoutError:
        why = f"no word of it and its devices in {PATIENCE_SECONDS:.0f} s: a driver hangs, or the disk it is read from"
        return [Finding("torch", why, "amiss", "dmesg and nvidia-smi, of which one may hang too, tell of a driver")], 0
    except RuntimeError as error:
        return [Finding("torch", f"it cannot be imported: {error}", "amiss", "python -c 'import torch' says why")], 0
    parts = [f"torch {told['torch']}", f"CUDA {told['cuda']}" if told["cuda"] else "for a CPU", *told["libraries"]]
    line = Finding("torch", f"{', '.join(parts)}; answered in {time.monotonic() - began:.1f} s")
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    devices = health.of_devices(len(told["gpus"]), told["gpus"], driver, told["cuda"])
    return [line, *devices], len(told["gpus"])


def of_links(gpus: int) -> list[Finding]:
    """Says how the GPUs are linked, as nvidia-smi draws it."""
    drawn = _said("nvidia-smi", "topo", "-m", whole=True) if gpus > 1 else None
    return [Finding("links", "\n".join(["", *(f"{'':<16}{line}" for line in drawn.splitlines())]))] if drawn else []


def compilers() -> dict[str, str | None]:
    return {name: _said(name, "--version") for name in ("gcc", "g++", "nvcc", "ninja")}


def has_headers() -> bool:
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def _said(*command: str, whole: bool = False) -> str | None:
    """The last line with a digit of the first lines that a program prints; None where it is not there or does not work."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    numbered = [line.strip() for line in done.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return done.stdout.rstrip() if whole else numbered[0] if numbered else done.stdout.strip()


def of_memory() -> Finding:
    memory, limit = psutil.virtual_memory(), None
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (told := path.read_text().strip()).isdecimal():
            limit = int(told)
    return health.of_memory(memory.total, memory.available, limit)


def disks(folder: Path) -> list[Finding]:
    """Returns the disk of the folder, and that of temporary files where it is another."""
    named = (("temporary files", Path(tempfile.gettempdir())), ("here", folder))
    places = {place.stat().st_dev: (name, place) for name, place in named}
    found = []
    for name, place in reversed(places.values()):
        usage = shutil.disk_usage(place)
        found.append(health.of_disk(name, usage.free, usage.total, kind_of(place)))
    return found


def kind_of(folder: Path) -> str:
    """Returns the file system of a folder: ext4, nfs4, lustre, ..."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown file system"


def of_shared_memory(gpus: int) -> Finding:
    place = Path("/dev/shm")
    usage = shutil.disk_usage(place) if place.is_dir() else None
    return health.of_shared_memory(usage and usage.total, usage.free if usage else 0, gpus)


def limits() -> list[Finding]:
    files, addresses = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_AS)[0]
    bounded = health.of_address_space(addresses)
    return [health.of_open_files(*files), *([bounded] if bounded else [])]


TAKEN = """
import sys
from filelock import FileLock, Timeout
try:
    FileLock(sys.argv[1]).acquire(timeout=0)
except Timeout:
    print("kept out")
"""


def try_locks(folder: Path) -> Finding:
    """Has another process try to take a lock that this one holds, in a folder of its own in `folder`."""
    kind = kind_of(folder)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".rowwise-doctor-", dir=folder) as place,
            FileLock(Path(place) / "lock", timeout=0),
        ):
            command = [sys.executable, "-P", "-c", TAKEN, str(Path(place) / "lock")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except OSError as error:
        return health.of_locks("here", kind, None, error.strerror or str(error))
    except (NotImplementedError, subprocess.TimeoutExpired) as error:
        return health.of_locks("here", kind, None, str(error))
    return health.of_locks("here", kind, done.stdout.strip() == "kept out")


if __name__ == "__main__":
    sys.exit(main())
