"""How long the parts of a model take on these machines, for `parallel.pipeline_schedule=auto` and for the cut.

Three stages of one layer each are made, timed and thrown away: one with the embedding, one with nothing else, one with the
norm, the head and the loss. A layer takes what the second does; what comes before and after is the rest of the others.
"""

import itertools
import math
import statistics
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rowwise.parallel.defer import WeightGradients, deferred
from rowwise.parallel.device import Clock, Mark, device_of
from rowwise.parallel.lanes import receive_from, send_to
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.precision import compute_dtype
from rowwise.parallel.sequence import attention_on, positions_on
from rowwise.trainer.activations import recompute
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.ends import Target

REPEATS = 5


@dataclass(frozen=True)
class Times:
    """Seconds of F, I and W for one micro-batch."""

    forward: float
    input: float
    weight: float

    @property
    def total(self) -> float:
        return self.forward + self.input + self.weight


@dataclass(frozen=True)
class PartTimes:
    """The times of what comes before the layers, of one layer, of what comes after; of one message between stages, and of gathering
    one layer's weights."""

    before: Times
    layer: Times
    after: Times
    send: float
    gather: float


def read_part_times(path: Path) -> PartTimes:
    """Reads the times in a JSON file, such as a run's pipeline/times.json. Raises ValueError."""
    try:
        times = TypeAdapter(PartTimes).validate_json(path.read_text(), strict=True)
        numbers = [*astuple(times.before), *astuple(times.layer), *astuple(times.after), times.send, times.gather]
        if not all(0 <= number < math.inf for number in numbers) or min(astuple(times.layer)) == 0:
            raise ValueError(
                f"parallel.pipeline_costs={path}: times are finite and at least 0, and those of a layer above 0"
            )
        return times
    except OSError as error:
        raise ValueError(f"parallel.pipeline_costs={path}: {error.strerror}; leave it null to measure") from None
    except ValidationError as error:  # is a ValueError too, and says less
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"parallel.pipeline_costs={path}: {where}: {first['msg']}") from None


def measure_parts(config: TrainConfig, mesh: Mesh) -> PartTimes:
    """Measures the parts of a run's model: medians of a few repeats, and of those the slowest rank's. What layers make again in
    the backward is in I. All ranks must call it."""
    model, batch, dtype = config.model, config.batch, compute_dtype(config.precision)
    positions = positions_on(mesh, batch.seq_len)
    length = batch.seq_len if positions is None else len(positions)
    tokens = torch.zeros(batch.micro_size, length, dtype=torch.int64, device=mesh.device)
    three = replace(config, model=replace(model, layers=3), compile=False)
    ends = [_time_stage(three, layer, tokens, mesh) for layer in range(3)]
    send = _time_message(torch.zeros(*tokens.shape, model.dim, dtype=dtype, device=mesh.device), mesh)
    gather = _time_gather(model, dtype, mesh) if config.parallel.zero == 3 else 0.0
    seconds = torch.tensor([*(t for end in ends for t in end), send, gather], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=mesh.save_group)
    first, layer, last, (send, gather) = (part.tolist() for part in seconds.split([3, 3, 3, 2]))
    before, after = ([max(0.0, a - b) for a, b in zip(end, layer, strict=True)] for end in (first, last))
    return PartTimes(Times(*before), Times(*layer), Times(*after), send, gather)


def _time_stage(config: TrainConfig, layer: int, tokens: Tensor, mesh: Mesh) -> tuple[float, float, float]:
    device, model, dtype = mesh.device, config.model, compute_dtype(config.precision)
    with torch.device(device):
        stage = Decoder(model, range(layer, layer + 1), attention_on(mesh), config.memory.fused_loss).to(dtype)
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        x = torch.randn(*tokens.shape, model.dim, dtype=dtype)
    if config.memory.recompute != "none":
        recompute([stage], config, None)
    clock, last = Clock(device_of(device)), stage.norm is not None
    rounds = []
    for _ in range(REPEATS + 1):
        later, marks = WeightGradients(), [clock.mark()]
        with deferred(later):
            given = tokens if layer == 0 else x.detach().requires_grad_()
            y = stage(given, positions, None, Target(tokens)).total if last else stage(given, positions)
        marks.append(clock.mark())
        y.backward(None if y.ndim == 0 else torch.ones_like(y))
        marks.append(clock.mark())
        later.run()
        rounds.append(_between(clock, *marks, clock.mark()))
    f, i, w = (statistics.median(kind) for kind in zip(*rounds[1:], strict=True))
    return f, i, w


def _time_message(tensor: Tensor, mesh: Mesh) -> float:
    """Half of a way there and back, between the first two positions of the pipeline."""
    axis, clock = mesh.pipeline, Clock(device_of(mesh.device))
    assert axis is not None
    rounds = []
    for _ in range(REPEATS + 1 if axis.rank < 2 else 0):
        began = clock.mark()
        if axis.rank == 0:
            send_to(1, tensor, axis, axis.lanes).wait()
        receive_from(1 - axis.rank, tensor, axis, axis.lanes).wait()
        if axis.rank == 1:
            send_to(0, tensor, axis, axis.lanes).wait()
        rounds += _between(clock, began, clock.mark())
    return statistics.median(rounds[1:]) / 2 if rounds else 0.0


def _time_gather(model: ModelConfig, dtype: torch.dtype, mesh: Mesh) -> float:
    group, clock = mesh.states.get_group("shard"), Clock(device_of(mesh.device))
    with torch.device("meta"):
        numbers = sum(p.numel() for p in Decoder(replace(model, layers=3), range(1, 2)).parameters())
    mine = torch.zeros(-(-numbers // group.size()), dtype=dtype, device=mesh.device)
    whole = mine.new_empty(mine.numel() * group.size())
    rounds = []
    for _ in range(REPEATS + 1):
        began = clock.mark()
        dist.all_gather_into_tensor(whole, mine, group=group)
        rounds += _between(clock, began, clock.mark())
    return statistics.median(rounds[1:])


def _between(clock: Clock, *marks: Mark) -> list[float]:
    """The seconds from each mark to the next."""
    return [b - a for a, b in itertools.pairwise(map(clock.seconds, marks))]


def write_part_times(times: PartTimes, path: Path) -> None:
    """Writes the times as `read_part_times` reads them."""
    path.write_bytes(TypeAdapter(PartTimes).dump_json(times, indent=2) + b"\n")
