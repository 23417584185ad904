"""Times this machine, once, and keeps what it does for `rowwise plan`: its products, its links, its host's step, a disk.

    rowwise measure                        all but disks; about half a minute
    rowwise measure folder=/mnt/nvme       and the disk of a folder that states, parameters or activations may wait in
    rowwise plan device=here model=llama_1b batch.global_size=64          with what was kept

Of its own are

    folder=PATH      writes and reads files there, without names, which are gone afterwards (gigabytes=4 of them)
    to=FILE.yaml     writes the device there too, for `rowwise plan device=FILE.yaml` on another machine

What was found is kept in this user's cache (~/.cache/rowwise/devices), by the name of the machine; a disk's figures stay until a
folder is given again. What one machine cannot tell, its network, is what is known of such devices. The machine should be idle.
Exit code 0; 1: it could not be timed; 2: the arguments are refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from rowwise.launch.backends import await_ranks
from rowwise.launch.rendezvous import interfaces
from rowwise.launch.settings import parse, read_words
from rowwise.launch.warm import Unanswered, Warm, WarmIsGone, warmed
from rowwise.trainer.files import write_whole
from rowwise.trainer.plan.devices import Device, kept_device, kept_file
from rowwise.trainer.screen import byte_count, count

PATIENCE_SECONDS = 300.0
OF_A_DISK = ("disk", "disk_read", "disk_room")


@dataclass(frozen=True)
class Settings:
    """The keys of the command."""

    folder: str | None = None
    gigabytes: float = 4.0
    to: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Prints a table and the device's YAML, and returns the exit code."""
    words = read_words("rowwise measure", __doc__, sys.argv[1:] if arguments is None else arguments)
    try:
        settings = parse(Settings, words, "folder=PATH")
        check_settings(settings)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    try:
        device, found = timed(settings)
    except (WarmIsGone, Unanswered, TimeoutError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    text = f"# rowwise measure, {time.strftime('%Y-%m-%d')}\n" + yaml.safe_dump(asdict(device), sort_keys=False)
    print("\n".join([*told(device, found), "", text.rstrip()]))
    kept_file().parent.mkdir(parents=True, exist_ok=True)
    for path in (kept_file(), *([Path(settings.to).expanduser()] if settings.to else [])):
        write_whole(path, text)
    print(f"kept in {kept_file()}: `rowwise plan device=here` takes it")
    return 0


def check_settings(settings: Settings) -> None:
    """Refuses what cannot be measured or written. Raises ValueError."""
    if settings.gigabytes <= 0:
        raise ValueError(f"gigabytes={settings.gigabytes:g}: give more than 0")
    if settings.folder is not None:
        folder = Path(settings.folder).expanduser()
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"folder={settings.folder}: give a folder that is there and that you may write in")
        if (free := shutil.disk_usage(folder).free) < 1.1e9 * settings.gigabytes:
            raise ValueError(
                f"folder={settings.folder}: it has {byte_count(free)} free, and {settings.gigabytes:g} GB are written there; give "
                "less of gigabytes=, or another folder"
            )
    if settings.to is not None:
        path = Path(settings.to).expanduser()
        if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
            raise ValueError(f"to={settings.to}: give the name of a file that ends in .yaml, in a folder that is there")


def timed(settings: Settings) -> tuple[Device, dict[str, Any]]:
    """Times this machine: its device, and what was found of it. Raises WarmIsGone, Unanswered and TimeoutError."""
    folder = None if settings.folder is None else str(Path(settings.folder).expanduser().absolute())
    with warmed(beforehand=("rowwise.launch.measuring",)) as warm:
        known = warm.ask("rowwise.launch.measuring:tell_known", seconds=PATIENCE_SECONDS)
        size = int(settings.gigabytes * 1e9)
        found = warm.ask("rowwise.launch.measuring:tell_alone", folder, size, seconds=PATIENCE_SECONDS)
        found["ranks"] = known["gpus"] or 2
        if found["ranks"] > 1:
            found |= _gathered(warm, found["ranks"])
    if folder is not None:
        found["disk_room"] = float(shutil.disk_usage(folder).free)
    return device_of(Device(**known["known"]), known["gpus"] or os.cpu_count() or 1, found), found


def _gathered(warm: Warm, ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rowwise-measure-") as place:
        call, store = "rowwise.launch.measuring:gather", str(Path(place) / "store")
        started = [warm.start(call, rank, ranks, store, environment=interfaces()) for rank in range(ranks)]
        if (told := await_ranks(warm, started)) is None:
            raise Unanswered(f"{ranks} ranks of this machine did not gather; `rowwise doctor` says what they lack")
        return told


def device_of(known: Device, devices: int, found: Mapping[str, Any]) -> Device:
    """Makes a device of what was `found`, of what is kept of a disk, and of what is `known` of its kind. What the machine does
    as a whole, a step on its host and its disk, is shared by its `devices`."""
    shared = {"step", "step_8bit", *OF_A_DISK}
    figures = {key: value / (devices if key in shared else 1) for key, value in found.items() if hasattr(known, key)}
    before = kept_device()
    kept = {} if before is None else {key: getattr(before, key) for key in OF_A_DISK}
    host = {} if known.cuda else {"host": found["bandwidth"]}
    ram = psutil.virtual_memory().total / devices
    rounded: dict[str, Any] = {
        key: float(f"{value:.4g}") for key, value in {**kept, **host, **figures, "ram": ram}.items()
    }
    return replace(known, **rounded, per_machine=devices, measured=True)


def told(device: Device, found: Mapping[str, Any]) -> list[str]:
    """Tells what was measured, a line a figure."""
    core = "of the device" if device.cuda else "of a core"
    rows = [
        ("products", f"{found['flops'] / 1e12:.3g} TFLOP/s", f"{core}, in {'16' if device.cuda else '32'} bits"),
        ("memory", f"{byte_count(found['bandwidth'])}/s", f"{core}, read and written"),
    ]
    if "host" in found:
        rows.append(
            ("host", f"{byte_count(found['host'])}/s", "between the device and pinned memory, of the slower direction")
        )
    if "link" in found:
        over = "NCCL" if device.cuda else "gloo"
        rows.append(
            ("link", f"{byte_count(found['link'])}/s", f"that each of {found['ranks']} ranks takes in, over {over}")
        )
    for figure, rule in (("step", "adamw"), ("step_8bit", "adamw8bit")):
        rows.append((rule, f"{count(found[figure])}/s", f"numbers that {found['threads']} threads of the host step"))
    if "disk" in found:
        past = "past the system's cache" if found["direct"] else "through the system's cache: there is no O_DIRECT here"
        rows.append(("disk, written", f"{byte_count(found['disk'])}/s", past))
        rows.append(("disk, read", f"{byte_count(found['disk_read'])}/s", past))
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]


if __name__ == "__main__":
    sys.exit(main())
