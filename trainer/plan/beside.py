"""What of a rank's rows waits beside its device, and what of them is under way: between files, the host's memory and the device.

On a CPU the host's memory is the device's. In files rows take no memory, but for what is read, changed or written: two blocks of
parameters as a pass goes through them, two of gradients, and three portions of a step. That is counted as the host's; it is told as a
bound, since how much of it is there at once depends on the disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rowwise.parallel.activations.config import is_folder
from rowwise.parallel.row_file import BLOCK
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.ledger import FILE, HOST
from rowwise.trainer.plan.states import Group, widths_of


def where(category: str, place: str, gpu: bool) -> str:
    """Names the category that counts what waits at a place: `none`, `cpu` or a folder."""
    if is_folder(place):
        return FILE
    return HOST if place == "cpu" and gpu else category


@dataclass(frozen=True)
class Ways:
    """How rows become whole parameters, and gradients rows: in which category those of `gradients` are counted, whether parameters
    cross ranks as codes (`coded`), and how many neighbours keep a copy of what was gathered (`inner`; 0: none do)."""

    gradients: str = "gradients"
    coded: bool = False
    inner: int = 0


def ways_of(config: TrainConfig, gpu: bool) -> Ways:
    """Tells how the rows of a run come and go."""
    memory, parallel = config.memory, config.parallel
    coded, inner = parallel.quantize_gather != "none", parallel.inner_shard
    if memory.offload_params == "none":
        return Ways(coded=coded, inner=inner)
    place = memory.offload_gradients if memory.offload_gradients != "none" else "cpu"
    return Ways(where("gradients", place, gpu), coded, inner)


def read_bytes(config: TrainConfig, groups: Iterable[Group]) -> int:
    """Counts the memory that blocks of parameters are read into from files: twice the largest, kept (`parallel.read_ahead`)."""
    if not is_folder(config.memory.offload_params):
        return 0
    width = widths_of(config).parameter
    return 2 * max(group.shard * width + BLOCK * len(group.tensors) for group in groups)
