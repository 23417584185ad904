"""What of a rank's rows waits beside its device, and what of them is under way: between files, the host's memory and the device.

On a CPU the host's memory is the device's. In files rows take no memory, but for what is read, changed or written: two blocks of
parameters as a pass goes through them, two of gradients, and three portions of a step. That is counted as the host's; it is told as a
bound, since how much of it is there at once depends on the disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rowwise.kernels.spec import ParameterSpec
from rowwise.optim.build import new_rule, rank_of, rule_name
from rowwise.optim.in_backward import BACKLOG_BYTES
from rowwise.parallel.activations.config import is_folder
from rowwise.parallel.row_file import BLOCK
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.ledger import FILE, HOST
from rowwise.trainer.plan.states import Group, Place, local_numbers, widths_of
from rowwise.trainer.plan.update import Entry, Portion


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
    return 2 * max(group.shard_bytes(width) + BLOCK * len(group.tensors) for group in groups)


def step_bytes(config: TrainConfig, portions: Iterable[Portion], gpu: bool) -> int:
    """Counts what of a step is in the host's memory beside what waits there: of three portions, one that comes, one that is changed
    and one that goes back, what is in files or on a GPU (`optim.home`). What is read from a file begins with a block of memory, and
    is whole blocks."""
    memory, width = config.memory, widths_of(config).parameter
    if memory.offload_states == "none":
        return 0
    crosses = gpu and memory.offload_params == "none"
    rows = width * ((is_folder(memory.offload_params) or crosses) + (is_folder(memory.offload_gradients) or crosses))
    states = is_folder(memory.offload_states)
    away = is_folder(memory.offload_params) + is_folder(memory.offload_gradients)
    sizes = [
        one.states * states + one.numbers * rows + 2 * BLOCK * (one.tensors * states + len(one.entries) * away)
        for one in portions
    ]
    return int(max((sum(sizes[n : n + 3]) for n in range(len(sizes))), default=0))


def scaling_bytes(config: TrainConfig, specs: Iterable[ParameterSpec], place: Place) -> int:
    """Counts the memory in which gradients that wait in files are measured and scaled, at most three parameters' at a time."""
    if not is_folder(config.memory.offload_gradients):
        return 0
    return 3 * (max(local_numbers(spec, place) for spec in specs) * widths_of(config).parameter + 2 * BLOCK)


def backlog_bytes(config: TrainConfig, specs: Iterable[Entry], place: Place) -> int:
    """Counts the gradients that may wait for steps which are made beside the backward (`optim.in_backward.StepsApart`)."""
    if config.memory.offload_states == "none" or not config.optim.in_backward:
        return 0
    rank = rank_of(config.optim, run_specs(config))
    apart = [
        local_numbers(spec, place) * widths_of(config).parameter
        for name, spec in specs
        if new_rule(rule_name(name, spec, config.optim), config.optim, rank).by_rows
    ]
    return min(sum(apart), max(BACKLOG_BYTES, max(apart, default=0)))
