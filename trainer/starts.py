"""starts.jsonl: every start of a run, and sample.json: what its model wrote at the end. Needs no torch.

metrics.jsonl has one record a step, whoever made it; when, where and by which command is told here, a line a start, so that
a reader sees which steps came after a resume.
"""

import contextlib
import platform
import socket
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from rowwise.trainer.files import to_json, write_whole, writing
from rowwise.trainer.keys import without_password

Report = Literal["always", "failed", "never"]  # when a run that has ended leaves its report.html
STARTS, SAMPLE = "starts.jsonl", "sample.json"


@dataclass(frozen=True)
class Start:
    """A start: the steps after `step` are of it. `device`: its name; `parameters`: of the model; `time`: with its zone."""

    step: int
    workers: int
    device: str
    parameters: int
    command: str | None = None
    time: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))
    host: str = field(default_factory=socket.gethostname)
    versions: dict[str, str] = field(default_factory=lambda: versions())


@dataclass(frozen=True)
class Sample:
    """What the model of `step` wrote: `text` has `prompt` at its beginning."""

    step: int
    prompt: str
    text: str


_START, _SAMPLE = TypeAdapter(Start), TypeAdapter(Sample)


def versions() -> dict[str, str]:
    """Returns the versions of what the numbers of a run depend on."""
    found = {}
    for name in ("rowwise", "torch", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**found, "python": platform.python_version()}


def keep_start(run_dir: Path, start: Start) -> None:
    """Adds a line, with stars for a password. Raises DiskFull."""
    path = run_dir / STARTS
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(to_json(asdict(_shown(start))) + "\n")


def read_starts(run_dir: Path) -> list[Start]:
    """Reads the starts of a run, in their order; a line that is none is passed over."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run_dir / STARTS).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(_shown(_START.validate_json(line, strict=True)))
    return found


def _shown(start: Start) -> Start:
    return start if start.command is None else replace(start, command=without_password(start.command))


def keep_sample(run_dir: Path, sample: Sample) -> None:
    """Writes it in the place of an earlier one. Raises DiskFull."""
    write_whole(run_dir / SAMPLE, to_json(asdict(sample)) + "\n")


def read_sample(run_dir: Path) -> Sample | None:
    """Reads what the model has written; None where that is nothing yet, or the file is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return _SAMPLE.validate_json((run_dir / SAMPLE).read_bytes(), strict=True)
    return None
