"""What devices have and can do, as far as a plan needs it.

Memory is what torch says there is (`torch.cuda.mem_get_info`, also in its out-of-memory errors), less than the box says. The other
figures are of the vendors' data sheets: dense 16-bit FLOP/s that add up in 32 bits, memory and link bandwidths, links one way
(NVLink 3, 4 and 5: 300, 450, 900 GB/s; PCIe 4 and 5 x16: 32, 64 GB/s). Between machines: 400 Gb/s a GPU as in DGX H100, H200 and
B200, 200 Gb/s as in DGX A100, and a network of 25 Gb/s for cards of desktops. A device has an eighth of its
machine's memory (1 TiB in a DGX A100, 2 TiB in newer ones; 32 GiB a desktop's card) and of what its NVMe drives write. `cpu` is a core
of a server of today, roughly, with
this machine's memory.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil
import yaml
from pydantic import TypeAdapter, ValidationError

from rowwise.trainer.keys import told_of_type, unknown_key

GIBI = 1 << 30


@dataclass(frozen=True)
class Device:
    """`memory`: bytes; `flops`: dense 16-bit FLOP/s; `bandwidth`: of its memory, `link`: to another device of its machine,
    `network`: to one of another machine, `host`: to its machine's memory, and `disk` to its files, bytes a second and direction;
    `per_machine`: how many there are in one, `ram`: bytes of its memory a device; `cuda`: whether it is a GPU of NVIDIA's; `wide`: by
    how much it multiplies slower in 32 bits."""

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
    """Finds a device by its name, or reads a YAML of one. Raises ValueError."""
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        memory = psutil.virtual_memory().total
        return Device("cpu", memory, 60e9, 10e9, 5e9, 1e9, 10e9, cuda=False, wide=1.0, ram=memory)
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"device={name}: possible are {', '.join([*DEVICES, 'cpu'])}, or the path of a .yaml file")
    return _read(path)


def _read(path: Path) -> Device:
    known = [field.name for field in fields(Device)]
    if not path.is_file():
        raise ValueError(
            f"device={path}: there is no such file; give a YAML of {', '.join(known)}, or one of {', '.join(DEVICES)}, cpu"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"device={path}: {' '.join(str(error).split())}; give a YAML of {', '.join(known)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"device={path}: it is no YAML of KEY: VALUE; give {', '.join(known)}")
    for key in content:
        if key not in known:
            raise ValueError(f"device={path}: {unknown_key(str(key), known)}")
    try:
        device = TypeAdapter(Device).validate_python({"name": path.stem, **content})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing_argument" or first["type"] == "missing":
            raise ValueError(f"device={path}: {key} is missing; a device has {', '.join(known)}") from None
        raise ValueError(f"device={path}: {key}={first['input']!r}: {told_of_type(first)}") from None
    for key in known:
        value = getattr(device, key)
        if isinstance(value, float | int) and not isinstance(value, bool) and not 0 < value < float("inf"):
            raise ValueError(f"device={path}: {key}={value}: give a number above 0")
    return device


NAMES = {"H200": "h200", "H100": "h100", "B200": "b200", "A100": "a100_80", "4090": "rtx4090", "3090": "rtx3090"}


def device_here(name: str, memory: float, devices: int) -> Device:
    """Finds the figures of a GPU by what it is called (of one that is not known, those of an A100), with its own memory and its
    share of the machine's."""
    known = next((key for word, key in NAMES.items() if word in name), "a100_80")
    return replace(DEVICES[known], name=name, memory=memory, ram=psutil.virtual_memory().total / devices)
