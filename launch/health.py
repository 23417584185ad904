"""What is well with a machine and what is amiss, with the command that mends it: pure functions of what was found there.

The least that is asked for is what the default model needs; larger runs ask themselves, before they start. Needs no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rowwise.trainer.screen import byte_count

LEAST_FREE_BYTES = 2 << 30  # of the disk that runs are written to
LEAST_SHARED_BYTES = (
    512 << 20
)  # of /dev/shm, through which NCCL's ranks of one machine talk; containers often have 64 MiB
LEAST_MEMORY_BYTES = 2 << 30
LEAST_OPEN_FILES = 1024
LEAST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Finding:
    """What was found of one thing: `state` is "amiss" where it would stop a run, "note" where it would stop an option; `mend`: what
    to do."""

    what: str
    text: str
    state: Literal["ok", "note", "amiss"] = "ok"
    mend: str | None = None


def of_python(version: tuple[int, ...], told: str) -> Finding:
    if version < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return Finding(
            "python", told, "amiss", f"make the environment with Python {least} or later: uv venv --python 3.12"
        )
    return Finding("python", told)


def of_packages(required: Mapping[str, str | None]) -> list[Finding]:
    """Judges packages: name -> version, None where it is not there."""
    there = ", ".join(f"{name} {version}" for name, version in required.items() if version is not None)
    missing = [name for name, version in required.items() if version is None]
    if missing:
        named = " ".join(missing)
        return [
            Finding("packages", there),
            Finding("packages", f"not installed: {named}", "amiss", f"python -m pip install {named}"),
        ]
    return [Finding("packages", there)]


def of_disk(where: str, free: int, total: int, kind: str) -> Finding:
    told = f"{where}: {byte_count(free)} of {byte_count(total)} free ({kind})"
    if free < LEAST_FREE_BYTES:
        return Finding("disk", told, "amiss", "make room there, or give a run_dir= on another disk")
    return Finding("disk", told)


def of_shared_memory(total: int | None, free: int, gpus: int) -> Finding:
    """Judges the size of /dev/shm; None where there is none."""
    told = "no /dev/shm" if total is None else f"/dev/shm: {byte_count(free)} of {byte_count(total)} free"
    if free >= LEAST_SHARED_BYTES:
        return Finding("shared", told)
    mend = "in a container: docker run --shm-size=8g (or --ipc=host); else, as root: mount -o remount,size=8G /dev/shm"
    return Finding("shared", told, "amiss" if gpus > 1 else "note", mend)


def of_memory(total: int, available: int, limit: int | None) -> Finding:
    """Judges the memory. `limit`: that of the control group, where it has one."""
    most = total if limit is None else min(total, limit)
    bound = "" if limit is None or limit >= total else f", of which this process may have {byte_count(limit)}"
    told = f"{byte_count(available)} of {byte_count(total)} free{bound}"
    if min(available, most) < LEAST_MEMORY_BYTES:
        return Finding(
            "memory", told, "amiss", "end what else runs here, or raise the limit (docker run --memory, Slurm's --mem)"
        )
    return Finding("memory", told)


def of_open_files(soft: int, hard: int) -> Finding:
    """Judges the limit of open files; -1: no limit."""
    told = f"{_limit(soft)} open files, {_limit(hard)} at most"
    if 0 <= hard < LEAST_OPEN_FILES:
        return Finding("limits", told, "amiss", f"ulimit -n {LEAST_OPEN_FILES}, or nofile in /etc/security/limits.conf")
    return Finding("limits", told)


def of_address_space(soft: int) -> Finding | None:
    """Judges the limit of addresses; None where there is none: torch takes many GB of addresses, and little of them as memory."""
    if soft < 0:
        return None
    return Finding("limits", f"addresses are limited to {byte_count(soft)}", "note", "ulimit -v unlimited")


def _limit(number: int) -> str:
    return "any number of" if number < 0 else f"{number:,}"


def of_locks(where: str, kind: str, excluded: bool | None, why: str = "") -> Finding:
    """Judges locks. `excluded`: whether a lock that one process holds kept another out; None where none could be had."""
    if excluded:
        return Finding("locks", f"{where} ({kind}): a lock keeps other processes out")
    told = (
        f"{where} ({kind}): a lock keeps nobody out"
        if excluded is False
        else f"{where} ({kind}): no lock can be had ({why})"
    )
    return Finding(
        "locks",
        told,
        "amiss",
        "give a run_dir= on a file system with locks, or mount this one with them",
    )


def of_compilers(found: Mapping[str, str | None], headers: bool, gpus: int) -> list[Finding]:
    """Judges compilers: program -> what it says of its version, None where it is not on the path. `headers`: whether Python's are
    there."""
    findings = []
    needed = {
        "gcc": ("Triton's kernels", "apt-get install gcc"),
        "g++": ("compile=true on a CPU", "apt-get install g++"),
    }
    for name, told in found.items():
        if told is not None:
            findings.append(Finding(name, told))
        elif name in needed:
            what, mend = needed[name]
            stops = name == "gcc" and gpus > 0
            findings.append(Finding(name, f"not on the path: {what} need it", "amiss" if stops else "note", mend))
        else:
            findings.append(Finding(name, "not on the path; nothing here needs it"))
    if not headers:
        told, mend = "Python.h is not there: Triton's kernels need it", "apt-get install python3-dev"
        findings.append(Finding("headers", told, "amiss" if gpus else "note", mend))
    return findings


def of_devices(seen: int, told: list[str], driver: str | None, cuda: str | None) -> list[Finding]:
    """Judges devices. `seen`: the GPUs that torch sees, described by `told`; `driver`: what nvidia-smi tells of its version, None
    without it; `cuda`: what torch is built for, None for a CPU alone."""
    if seen:
        return [Finding("devices", line) for line in told]
    if driver is None:
        return [Finding("devices", "no GPU: runs compute on the CPU")]
    if cuda is None:
        said = f"this machine has GPUs (driver {driver}), and torch is built for a CPU"
        return [
            Finding(
                "devices",
                said,
                "amiss",
                "install a torch that is built for CUDA: python -m pip install -U torch",
            )
        ]
    said = f"this machine has GPUs (driver {driver}), and torch, built for CUDA {cuda}, sees none"
    mend = "nvidia-smi says whether they are well; CUDA_VISIBLE_DEVICES may hide them; the driver may be older than CUDA asks for"
    return [Finding("devices", said, "amiss", mend)]


def of_collective(backend: str, seconds: float | None, moved: int, why: str = "") -> Finding:
    """Judges a backend. `seconds`: of an all-reduce of `moved` bytes on two ranks; None where it failed."""
    if seconds is None:
        mend = {
            "gloo": "is there a loopback (ip addr show lo), and does a firewall let it through?",
            "nccl": "NCCL_DEBUG=INFO rowwise doctor says more",
        }[backend]
        return Finding(backend, f"two ranks could not exchange anything: {why}", "amiss", mend)
    speed = f"{moved / seconds / 1e9:.2g} GB/s"
    return Finding(backend, f"two ranks add up {byte_count(moved)} in {seconds * 1e3:.2g} ms ({speed})")


def without_home(text: str, home: str) -> str:
    """Returns a path of a person's as it may stand in a report."""
    return re.sub(rf"{re.escape(home)}(?=/|$|\s|:)", "~", text) if home not in ("", "/") else text


def report(findings: list[Finding]) -> list[str]:
    """Returns a line each, and below it how to mend what is not well."""
    marks = {"ok": "    ", "note": "  - ", "amiss": "  ! "}
    lines = []
    for one in findings:
        lines.append(f"{marks[one.state]}{one.what:<11}{one.text}")
        if one.mend is not None:
            lines.append(f"{'':<15}mend: {one.mend}")
    amiss = [one for one in findings if one.state == "amiss"]
    return [
        *lines,
        "",
        f"amiss: {', '.join(dict.fromkeys(one.what for one in amiss))}" if amiss else "nothing that stops a run",
    ]
