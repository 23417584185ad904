"""What devices have and can do, as far as a plan needs it.

Memory is what torch says there is (`torch.cuda.mem_get_info`, also in its out-of-memory errors), less than the box says. The other
figures are of the vendors' data sheets: dense 16-bit FLOP/s that add up in 32 bits, memory and link bandwidths, links one way
(NVLink 3, 4 and 5: 300, 450, 900 GB/s; PCIe 4 and 5 x16: 32, 64 GB/s). Between machines: 400 Gb/s a GPU as in DGX H100, H200 and
B200, 200 Gb/s as in DGX A100, and a network of 25 Gb/s for cards of desktops. A device has an eighth of its
machine's memory (1 TiB in a DGX A100, 2 TiB in newer ones; 32 GiB a desktop's card), of what its NVMe drives write and read and have
room for, and of its cores, which step a billion numbers a second for it: roughly, what memory of 50 GB/s carries. `cpu` is a core
of a server of today, roughly, with this machine's memory. `rowwise measure` times the machine it is called on.
"""

import contextlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from platformdirs import user_cache_dir
from pydantic import TypeAdapter, ValidationError

from rowwise.trainer.keys import told_of_type, unknown_key

GIBI = 1 << 30
OF_PEAKS = {"products": 0.55, "attention": 0.35, "memory": 0.6, "links": 0.7}
OF_MEASURED = {"products": 0.8, "attention": 0.5, "memory": 0.85, "links": 1.0}  # of a large product, a large copy, ...


@dataclass(frozen=True)
class Device:
    """`memory`: bytes; `flops`: dense 16-bit FLOP/s; `bandwidth`: of its memory, `link`: to another device of its machine,
    `network`: to one of another machine, `host`: to its machine's memory, and `disk` to its files, bytes a second and direction;
    `per_machine`: how many there are in one, `ram`: bytes of its memory a device; `cuda`: whether it is a GPU of NVIDIA's; `wide`: by
    how much it multiplies slower in 32 bits. `disk_read`: from files, bytes a second, and `disk_room`: for them, bytes a device.
    `step`: numbers a second that the host steps for it by AdamW, and `step_8bit`: by one of 8-bit states. `measured`: speeds are
    what was reached, and not peaks."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float
    per_machine: int = 8
    cuda: bool = True
    wide: float = 2.0
    ram: float = 128 * GIBI
    disk: float = 1.5e9
    disk_read: float = 3e9
    disk_room: float = 3e12
    step: float = 1e9
    step_8bit: float = 1e9
    measured: bool = False

    def reached(self, what: str) -> float:
        """Tells which share of its speed a run reaches: of products, attention, memory or links."""
        return (OF_MEASURED if self.measured else OF_PEAKS)[what]


FIGURES = [field.name for field in fields(Device)]
OF_DEVICE = "device."  # what a figure is called that the command line gives


def _card(
    name: str, gibi: float, tera: float, bandwidth: float, link: float, network: float, host: float, ram: float
) -> Device:
    memory = gibi * GIBI
    return Device(name, memory, tera * 1e12, bandwidth * 1e9, link * 1e9, network * 1e9, host * 1e9, ram=ram * GIBI)


DEVICES = {
    device.name: device
    for device in (
        _card("h100", 79.1, 989, 3350, 450, 50, 64, 256),
        _card("h200", 139.8, 989, 4800, 450, 50, 64, 256),
        _card("a100_40", 39.4, 312, 1555, 300, 25, 32, 128),
        _card("a100_80", 79.2, 312, 2039, 300, 25, 32, 128),
        _card("b200", 178.3, 2250, 8000, 900, 50, 64, 256),
        _card("rtx4090", 23.6, 165, 1008, 25, 3.1, 32, 32),
        _card("rtx3090", 23.7, 71, 936, 25, 3.1, 32, 32),
    )
}


def device_named(name: str) -> Device:
    """Finds a device by its name, or reads a YAML of one; `here` is this machine's as `rowwise measure` timed it. Raises
    ValueError."""
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        memory = psutil.virtual_memory().total
        return Device(
            "cpu", memory, 60e9, 10e9, 5e9, 1e9, 10e9, cuda=False, wide=1.0, ram=memory, step=2e8, step_8bit=1e8
        )
    if name == "here":
        if (device := kept_device()) is None:
            raise ValueError(
                "device=here: this machine was not timed yet; `rowwise measure` does it, in about a minute"
            )
        return device
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"device={name}: possible are {', '.join([*DEVICES, 'cpu', 'here'])}, or the path of a .yaml file"
        )
    return read_device(path)


def read_device(path: Path) -> Device:
    """Reads a YAML of a device. Raises ValueError."""
    known = ", ".join(FIGURES)
    if not path.is_file():
        raise ValueError(
            f"device={path}: there is no such file; give a YAML of {known}, or one of {', '.join(DEVICES)}, cpu, here"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"device={path}: {' '.join(str(error).split())}; give a YAML of {known}") from None
    if not isinstance(content, dict):
        raise ValueError(f"device={path}: it is no YAML of KEY: VALUE; give {known}")
    return _checked(f"device={path}: ", {"name": path.stem, **content})


def with_figures(device: Device, words: Sequence[str]) -> Device:
    """Gives a device other figures, each `device.KEY=VALUE`, where KEY may end in _bandwidth. Raises ValueError."""
    given = dict(word.partition("=")[::2] for word in words)
    figures = {key.removeprefix(OF_DEVICE).removesuffix("_bandwidth"): value for key, value in given.items()}
    for key in figures.keys() - set(FIGURES):
        raise ValueError(unknown_key(OF_DEVICE + key, FIGURES))
    return _checked(OF_DEVICE, {**asdict(device), **figures})


def _checked(where: str, content: dict[str, Any]) -> Device:
    for key in content:
        if key not in FIGURES:
            raise ValueError(f"{where}{unknown_key(str(key), FIGURES)}")
    try:
        device = TypeAdapter(Device).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing_argument" or first["type"] == "missing":
            raise ValueError(f"{where}{key} is missing; a device has {', '.join(FIGURES)}") from None
        raise ValueError(f"{where}{key}={first['input']!r}: {told_of_type(first)}") from None
    for key in FIGURES:
        value = getattr(device, key)
        if isinstance(value, float | int) and not isinstance(value, bool) and not 0 < value < float("inf"):
            raise ValueError(f"{where}{key}={value}: give a number above 0")
    return device


def kept_file() -> Path:
    """Names the file of this user's that keeps what this machine was timed to do."""
    return Path(user_cache_dir("rowwise")) / "devices" / f"{platform.node() or 'this machine'}.yaml"


def kept_device() -> Device | None:
    """Reads what `rowwise measure` found of this machine; None where it was not called, or what it kept is not whole."""
    with contextlib.suppress(ValueError):
        return read_device(kept_file())
    return None


NAMES = {"H200": "h200", "H100": "h100", "B200": "b200", "A100": "a100_80", "4090": "rtx4090", "3090": "rtx3090"}


def device_here(name: str, memory: float, devices: int) -> Device:
    """Finds the figures of a GPU by what it is called (of one that is not known, those of an A100), with its own memory and its
    share of the machine's."""
    known = next((key for word, key in NAMES.items() if word in name), "a100_80")
    return replace(DEVICES[known], name=name, memory=memory, ram=psutil.virtual_memory().total / devices)
