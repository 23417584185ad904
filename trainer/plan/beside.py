"""What of a rank's rows waits beside its device, and what of them is under way: between files, the host's memory and the device.

On a CPU the host's memory is the device's. In files rows take no memory, but for what is read, changed or written: two blocks of
parameters as a pass goes through them, two of gradients, and three portions of a step. That is counted as the host's; it is told as a
bound, since how much of it is there at once depends on the disk.
"""

from dataclasses import dataclass

from rowwise.parallel.activations.config import is_folder
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.ledger import FILE, HOST


def where(category: str, place: str, gpu: bool) -> str:
    """Names the category that counts what waits at a place: `none`, `cpu` or a folder."""
    if is_folder(place):
        return FILE
    return HOST if place == "cpu" and gpu else category


@dataclass(frozen=True)
class RowsAway:
    """Where a rank's rows of gradients are counted, and whether those of parameters are read from files, block by block."""

    gradients: str = "gradients"
    read: bool = False


def rows_away(config: TrainConfig, gpu: bool) -> RowsAway:
    """Tells where rows of gradients and of parameters of a run wait."""
    memory = config.memory
    place = memory.offload_gradients if memory.offload_gradients != "none" else "cpu"
    if memory.offload_params == "none":
        return RowsAway()
    return RowsAway(where("gradients", place, gpu), is_folder(memory.offload_params))
