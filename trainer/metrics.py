"""metrics.jsonl: one record a step, over all resumes. Needs no torch."""

import contextlib
import hashlib
import math
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rowwise.trainer.files import free_name, from_json, to_json, write_whole, writing


@dataclass(frozen=True)
class Recorded:
    """What a checkpoint knows of the records that it counts on: they are of the steps after `began`, where the run began
    from nothing or from a checkpoint of another, and `sha256` is that of their lines. None: not known."""

    began: int | None = 0
    sha256: str | None = None


class RunMoved(Exception):
    """The folder of a run was moved or removed while it was under way."""


class MetricsLog:
    """The metrics.jsonl of a run. Opening it after `step` drops what was written beyond: those steps come again.

    What else is found wrong with it is told in `remarks`, and then the file as it was is kept beside the new one.
    """

    def __init__(self, run_dir: Path, step: int, recorded: Recorded | None = None):
        self._path, self.remarks = run_dir / "metrics.jsonl", list[str]()
        recorded = recorded or Recorded()
        content = _content(self._path)
        found, faults = sort_out(content)
        began = min([step, *(at - 1 for at in found)]) if recorded.began is None else recorded.began
        text = "".join(f"{found[at]}\n" for at in sorted(found) if began < at <= step)
        self._began, self._digest = began, hashlib.sha256(text.encode())
        if recorded.sha256 != self._digest.hexdigest():
            faults += differences(found, began, step) or [f"a record up to step {step} is not as it was written"] * (
                recorded.sha256 is not None
            )
        if faults:
            self._keep_aside(content, "damaged", f"is damaged: {'; '.join(faults)}")
        elif began == step and found:
            cut_off = f"has records up to step {max(found)} of a run that was cut off before it first saved"
            self._keep_aside(content, "before", cut_off)
        write_whole(self._path, text)
        self._file = self._path.open("ab", buffering=0)
        self._durable()

    def _keep_aside(self, content: bytes, why: str, told: str) -> None:
        """Before the file is written anew, so that whatever ends this process loses nothing."""
        if content:
            aside = free_name(self._path.with_name(f"{self._path.name}.{why}"))
            with writing(aside):
                aside.write_bytes(content)
            told += f"; kept as {aside.name}"
        self.remarks.append(f"{self._path} {told}")

    def append(self, record: dict[str, Any]) -> None:
        """Writes one record so that it survives the death of this process: the whole line, or none of it. Raises DiskFull."""
        written = line = (to_json(record) + "\n").encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            with writing(self._path):
                while line:
                    line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(before)
            raise
        self._digest.update(written)

    def sync(self) -> Recorded:
        """Makes what was appended survive the death of this machine, before a checkpoint counts on it, which is to keep what
        is returned. Raises RunMoved where nobody would find it."""
        self._durable()
        ours = os.fstat(self._file.fileno())
        try:
            theirs = self._path.stat()
        except FileNotFoundError:
            theirs = None
        if theirs is None or (theirs.st_ino, theirs.st_dev) != (ours.st_ino, ours.st_dev):
            raise RunMoved(
                f"{self._path.parent} was moved, removed or replaced under way: what was saved and recorded before went with it; "
                "move it back, and the same command goes on"
            )
        return Recorded(self._began, self._digest.hexdigest())

    def _durable(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _content(path: Path) -> bytes:
    """What is in the file; nothing where there is none. Raises OSError, which names it."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:  # one of reading does not say of what
        raise OSError(error.errno, error.strerror, str(path)) from None


def sort_out(content: bytes) -> tuple[dict[int, str], list[str]]:
    """Returns the lines that are records, by their steps, and what is wrong with the others, a phrase each. What follows the last
    line break was cut off."""
    found: dict[int, str] = {}
    bad, again, ordered = [], [], True
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        record = record_of(line)
        if record is None:
            bad.append(number)
        elif record["step"] in found:
            again.append(record["step"])
        else:
            ordered &= not found or next(reversed(found)) < record["step"]
            found[record["step"]] = line.decode()
    faults = [f"no record in line {spans(bad)}"] * bool(bad) + [f"step {spans(again)} stands there again"] * bool(again)
    return found, faults if ordered else [*faults, "the steps are not in their order"]


def differences(found: Container[int], began: int, step: int) -> list[str]:
    """Returns what `found` has not, and has too much, of the steps of a run that `began` there."""
    missing = [at for at in range(began + 1, step + 1) if at not in found]
    foreign = [at for at in range(1, began + 1) if at in found]
    return [f"step {spans(missing)} is missing"] * bool(missing) + [f"step {spans(foreign)} is of another run"] * bool(
        foreign
    )


def record_of(line: bytes | str) -> dict[str, Any] | None:
    """Returns the record in a line; None where it is none."""
    try:
        record = from_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 < step < 1 << 53 else None


def number(value: Any) -> float | None:
    """Returns the number that a record has there; None where it is none, or too large to be one."""
    with contextlib.suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(found := float(value)):
            return found
    return None


def spans(numbers: list[int], most: int = 5) -> str:
    """Writes steps as spans, such as 3, 5 to 9."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    told = [f"{first} to {last}" if last > first else f"{first}" for first, last in spans]
    return ", ".join(told[:most] + ([f"and {len(told) - most} more"] if len(told) > most else []))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the records of a run so far, as they stand there; what is no record is passed over. Raises OSError."""
    path = Path(run_dir) / "metrics.jsonl"
    content = _content(path)
    return [record for line in content.split(b"\n")[:-1] if (record := record_of(line)) is not None]


def last_step(run_dir: Path) -> int:
    """Says how far the records of a run reach; 0 where they do not tell."""
    with contextlib.suppress(OSError):
        return max((record["step"] for record in read_metrics(run_dir)), default=0)
    return 0


def last_records(run_dir: Path, most: int, rooms: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Returns at most `most` of a run's last records, out of the end of its file alone, which has as many bytes as the last of
    `rooms` or as it takes; none where it cannot be read."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            for room in rooms or (1 << 14, 1 << 18, end):  # a record of many layers is long
                file.seek(max(0, end - room))
                lines = file.read(room).split(b"\n")[:-1]
                lines = lines[1:] if end > room else lines  # the first began before
                found = [record for line in lines[-most:] if (record := record_of(line)) is not None]
                if end <= room or len(lines) >= most:
                    break
    except OSError:
        return []
    return found


def last_number(run_dir: Path, key: str) -> float | None:
    """Returns the last number that a run has under `key`, looked for from the end of its records, at most 16 MiB; None where none
    is."""
    sought, piece = f'"{key}"'.encode(), 1 << 18
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as file:
        end, begun = file.seek(0, os.SEEK_END), b""
        for start in range(end - piece, end - 64 * piece, -piece):
            file.seek(max(0, start))
            block = file.read(min(piece, start + piece)) + begun
            begun, *lines = block.split(b"\n") if start > 0 else [b"", *block.split(b"\n")]
            for line in reversed(lines):
                if sought in line and (record := record_of(line)) and (found := number(record.get(key))) is not None:
                    return found
            if start <= 0:
                break
    return None


class MetricsTail:
    """Reads the metrics.jsonl of a run under way bit by bit. A run that is resumed writes its file anew, and what was read
    may come again."""

    def __init__(self, run_dir: Path):
        self._path, self._file, self._read = run_dir / "metrics.jsonl", 0, 0

    def read(self) -> list[dict[str, Any]]:
        """Reads the records since the last call."""
        try:
            with self._path.open("rb") as file:
                if (number := os.fstat(file.fileno()).st_ino) != self._file:
                    self._file, self._read = number, 0
                file.seek(self._read)
                lines = file.read().split(b"\n")[:-1]
        except OSError:  # not there yet, or not now
            return []
        self._read += sum(len(line) + 1 for line in lines)
        return [record for line in lines if (record := record_of(line)) is not None]
