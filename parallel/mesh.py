"""Names the axes of the mesh, checks their product, and makes the process groups: the only place that does.

    pipeline x replicate x shard x ulysses x ring = world size

Data is split over (replicate, shard), each sequence over (ring, ulysses), and states over (shard, ring, ulysses) as if
those were one axis. The pipeline axis varies slowest: its messages are the fewest, so they may cross machines; ulysses
varies fastest, since nothing is computed while its messages are on their way.

Over which ranks a parameter is split and repeated is for its view to say, which its spec names (`kernels.spec`): a view
divides the ranks of a stage of the pipeline into axes of its own. All parameters of a decoder are in the view above, `dense`.
"""

import datetime
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import DENSE
from rowwise.parallel import torch_c10d
from rowwise.parallel.accelerate.config import ENGINE, DeepSpeedConfig
from rowwise.parallel.lanes import Axis, connect, neighbours, open_lanes

DEGREES = ("pipeline", "replicate", "shard", "ring", "ulysses")  # the slowest first
RING_ORDER = Literal["contiguous", "zigzag", "striped"]
GATHERING = Literal["micro_batch", "run"]


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the axes, and how they are used.

    `replicate`: copies of what is split; each has data of its own. `shard`: ranks that split states; each has data of its
    own; -1: what the others leave. `zero`: what is split over the shard axis and the ranks that share sequences: 0 nothing,
    1 optimizer states, 2 and gradients, 3 and parameters. `ulysses`: ranks that share every sequence, and the heads of
    attention over it. `ring`: ranks that share every sequence, and round which keys and values travel. `ring_order`: which
    tokens a rank of the ring has; null: zigzag; see `parallel.sequence`.

    `pipeline`: ranks that share the layers. `pipeline_schedule`: `gpipe`, `1f1b`, `interleaved_1f1b`, `zb_h1`, `zb_h2`,
    `zb_v`, `blockwise`, `auto`, or the path of a CSV. `virtual_stages`: stages a rank. `pipeline_unit`: the micro-batches
    of a unit of `blockwise`; null: as many as ranks. `pipeline_gather`: at `zero=3`, whether blocks are gathered for each
    micro-batch (`micro_batch`, least memory) or a rank's stage for a run of its actions (`run`, fewest messages); null:
    `run` for blockwise. `pipeline_memory`: of `auto`, how many times the activations of 1f1b a rank may hold.
    `pipeline_costs`: of `auto`, a JSON file of times; null: they are measured. `pipeline_trace`: the step whose timeline is
    kept; 0: none. `post_validation`: ranks step, and begin the next step, without waiting for the global norm, and undo
    both where that was wrong.

    `timeout_seconds`: how long a rank waits for a message of another before it gives up, which ends the job or, under
    torchrun with restarts, begins it again from its newest checkpoint; it bounds how long a machine that was cut off is
    waited for.

    `backend`: what carries it out: `torch`, all of the above; `accelerate`, an engine that Accelerate drives, which splits
    states over all ranks at `zero=1` to 3, with the same numbers. `accelerate`: that engine: `deepspeed`, or `fsdp2` as
    Accelerate sets it up. `accelerate_config`: the path of a DeepSpeed configuration (JSON) or of what `accelerate config`
    wrote (YAML), which may add what the run does not say. `deepspeed`: see there."""

    replicate: MayChange[int] = 1
    shard: MayChange[int] = -1
    zero: MayChange[int] = 1
    pipeline: MayChange[int] = 1
    pipeline_schedule: MayChange[str] = "1f1b"
    virtual_stages: MayChange[int] = 1
    pipeline_unit: MayChange[int | None] = None
    pipeline_gather: MayChange[GATHERING | None] = None
    pipeline_memory: MayChange[float] = 1.0
    pipeline_costs: MayChange[str | None] = None
    pipeline_trace: MayChange[int] = 0
    post_validation: MayChange[bool] = False
    ulysses: MayChange[int] = 1
    ring: MayChange[int] = 1
    ring_order: MayChange[RING_ORDER | None] = None
    timeout_seconds: MayChange[int] = 1800
    backend: MayChange[Literal["torch", "accelerate"]] = "torch"
    accelerate: MayChange[ENGINE] = "deepspeed"
    accelerate_config: MayChange[str | None] = None
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def world_size(self) -> int:
        """How many workers the degrees make. Degrees must be resolved, here and below."""
        return math.prod(getattr(self, key) for key in DEGREES)

    @property
    def data_degree(self) -> int:
        """Into how many shares a global batch is split."""
        return self.replicate * self.shard

    @property
    def state_degree(self) -> int:
        """Into how many shards a state is split, at stages that split it."""
        return self.shard * self.ring * self.ulysses


A_YEAR = 365 * 24 * 3600
TIMEOUT: Refusals = (
    Refusal(
        ("parallel.timeout_seconds",),
        lambda run: not 1 <= run.parallel.timeout_seconds <= A_YEAR,
        f"parallel.timeout_seconds={{parallel.timeout_seconds}}: give 1 to {A_YEAR}, a year",
    ),
)


@dataclass(frozen=True)
class Workers:
    """Who this process is among all workers and among those of its machine; the launcher makes it. `store`
    is where they meet (None: one process)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: dist.Store | None = None


@dataclass(frozen=True)
class SequenceAxes:
    """The ranks that share this rank's sequences."""

    ring: Axis
    ulysses: Axis
    order: RING_ORDER

    @property
    def size(self) -> int:
        return self.ring.size * self.ulysses.size


@dataclass(frozen=True)
class View:
    """The ranks of a stage as some of its parameters see them: over which their rows, those of their gradients and of their
    optimizer states are split (`shard`) and repeated (`replicate`), the axes of the device mesh `states`."""

    states: DeviceMesh

    @property
    def replicas(self) -> int:
        """How many ranks hold the same rows."""
        names = self.states.mesh_dim_names
        assert names is not None
        return self.states.size(names.index("replicate"))  # of one axis by itself, a device mesh is made anew each time


@dataclass(frozen=True)
class Mesh:
    """The axes of this run, seen from one rank.

    `views`: those of its parameters, by name; `dense` is (replicate, shard x ring x ulysses). `pipeline` is None where the
    model is not cut, `sequence` where sequences are not. `save_group` is a gloo group of its own for the thread that writes
    checkpoints, so that its messages never mix with those of a step.
    """

    rank: int
    world_size: int
    device: torch.device
    views: Mapping[str, View]
    pipeline: Axis | None
    sequence: SequenceAxes | None
    save_group: dist.ProcessGroup

    @property
    def stages(self) -> int:
        """Ranks that hold one model between them, and see the same tokens."""
        return 1 if self.pipeline is None else self.pipeline.size

    @property
    def sequence_degree(self) -> int:
        """Ranks that hold one sequence between them."""
        return 1 if self.sequence is None else self.sequence.size

    @property
    def data_degree(self) -> int:
        return self.world_size // self.stages // self.sequence_degree

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads, out of `data_degree`. All stages of a replica, and all ranks
        that share its sequences, read the same."""
        return self.rank // self.sequence_degree % self.data_degree

    @property
    def states(self) -> DeviceMesh:
        """The device mesh of the dense view."""
        return self.views[DENSE].states

    def share(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Adds up the sums that this rank has of its rows in each view, each over the replicas that have it too: what all
        ranks' shares add up to counts every row once. A float64 scalar."""
        shares = [rows / self.views[view].replicas for view, rows in sums.items()]
        return functools.reduce(torch.add, shares) if shares else torch.zeros((), dtype=torch.float64)


def resolve_degrees(config: ParallelConfig, world_size: int) -> ParallelConfig:
    """Returns `config` with `shard=-1` filled in. Raises ValueError where the degrees do not multiply to the world size."""
    if config.zero not in (0, 1, 2, 3):
        raise ValueError(f"parallel.zero={config.zero}: possible are 0, 1, 2 and 3")
    degrees = {key: getattr(config, key) for key in DEGREES}
    given = " x ".join(
        f"parallel.{key}={n}" for key, n in degrees.items() if (n > 1 or key == "replicate") and key != "shard"
    )
    for key, degree in degrees.items():
        if degree < 1 and not (key == "shard" and degree == -1):
            raise ValueError(f"parallel.{key}={degree}: degrees are at least 1 (shard=-1 takes what is left)")
    if config.ring_order is not None and config.ring == 1:
        raise ValueError(
            f"parallel.ring_order={config.ring_order} with parallel.ring=1: there is no ring; give parallel.ring, or leave "
            "parallel.ring_order=null"
        )
    others = math.prod(degree for key, degree in degrees.items() if key != "shard")
    if config.shard == -1:
        if world_size % others:
            raise ValueError(
                f"{given} does not divide the world size {world_size}; possible are {divisors(world_size)}"
            )
        return replace(config, shard=world_size // others)
    if others * config.shard != world_size:
        raise ValueError(
            f"{given} x parallel.shard={config.shard} = {others * config.shard} workers, but the world size is "
            f"{world_size}; start {others * config.shard} workers or give parallel.shard=-1"
        )
    return config


def divisors(n: int) -> list[int]:
    """Lists all divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def pick_device(local_rank: int) -> torch.device:
    """Returns this worker's device: the GPU of its local rank, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"worker {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            f"start at most that many workers a machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


def make_mesh(config: ParallelConfig, workers: Workers) -> Mesh:
    """Makes the process groups (NCCL on GPUs, gloo on the CPU), connects them and names the axes. `config` must be
    resolved. A few numbers cross each axis."""
    device, timeout = pick_device(workers.local_rank), datetime.timedelta(seconds=config.timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=workers.store if workers.store is not None else dist.HashStore(),
        rank=workers.rank,
        world_size=workers.world_size,
        timeout=timeout,
    )
    # At stage 0 nothing is split: every rank of all these axes is a replica.
    split = config.state_degree if config.zero > 0 else 1
    shape = (config.pipeline, config.replicate * config.state_degree // split, split)
    axes = init_device_mesh(device.type, shape, mesh_dim_names=("pipeline", "replicate", "shard"))
    pipeline = _axis(axes, "pipeline", timeout) if config.pipeline > 1 else None
    sequence = _sequence_axes(config, device, workers.world_size, timeout)
    torch_c10d.bound_waits(timeout)
    ring, ulysses = (None, None) if sequence is None else (sequence.ring, sequence.ulysses)
    connect([torch_c10d.default_group(), *axes.get_all_groups()], ring, ulysses, device)
    if pipeline is not None:
        pipeline = replace(pipeline, lanes=open_lanes(pipeline, neighbours(pipeline.size), device))
    return Mesh(
        rank=workers.rank,
        world_size=workers.world_size,
        device=device,
        views={DENSE: View(axes["replicate", "shard"])},
        pipeline=pipeline,
        sequence=sequence,
        # A slow disk is not a rank that is gone: the half hour that torch gives.
        save_group=dist.new_group(backend="gloo"),
    )


def _sequence_axes(
    config: ParallelConfig, device: torch.device, world_size: int, timeout: datetime.timedelta
) -> SequenceAxes | None:
    sequence_degree = config.ring * config.ulysses
    if sequence_degree == 1:
        return None
    names = ("others", "ring", "ulysses")
    axes = init_device_mesh(
        device.type, (world_size // sequence_degree, config.ring, config.ulysses), mesh_dim_names=names
    )
    return SequenceAxes(_axis(axes, "ring", timeout), _axis(axes, "ulysses", timeout), config.ring_order or "zigzag")


def _axis(axes: DeviceMesh, name: str, timeout: datetime.timedelta) -> Axis:
    group = axes.get_group(name)
    return Axis(tuple(dist.get_process_group_ranks(group)), axes.get_local_rank(name), group, timeout)
