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
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rowwise.kernels.spec import DENSE
from rowwise.parallel import torch_c10d
from rowwise.parallel.config import RING_ORDER, ParallelConfig
from rowwise.parallel.lanes import Axis, connect, neighbours, open_lanes


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
class Levels:
    """The ranks over which states are split, as machines and the ranks within one: `inner` has the neighbours of this rank, `outer`
    those that have its place among theirs."""

    inner: Axis
    outer: Axis


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
    model is not cut, `sequence` where sequences are not, `levels` where no neighbours keep copies. `save_group` is a gloo group of
    its own for the thread that writes checkpoints, so that its messages never mix with those of a step.
    """

    rank: int
    world_size: int
    device: torch.device
    views: Mapping[str, View]
    pipeline: Axis | None
    sequence: SequenceAxes | None
    levels: Levels | None
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
    levels = _levels(config, device, workers.world_size, timeout)
    torch_c10d.bound_waits(timeout)
    ring, ulysses = (None, None) if sequence is None else (sequence.ring, sequence.ulysses)
    within = [] if levels is None else [levels.inner.group, levels.outer.group]
    exchanging = within or [axes.get_group("shard")] if config.quantize_reduce != "none" else []
    connect([torch_c10d.default_group(), *axes.get_all_groups(), *within], ring, ulysses, device, exchanging)
    if pipeline is not None:
        pipeline = replace(pipeline, lanes=open_lanes(pipeline, neighbours(pipeline.size), device))
    return Mesh(
        rank=workers.rank,
        world_size=workers.world_size,
        device=device,
        views={DENSE: View(axes["replicate", "shard"])},
        pipeline=pipeline,
        sequence=sequence,
        levels=levels,
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


def _levels(
    config: ParallelConfig, device: torch.device, world_size: int, timeout: datetime.timedelta
) -> Levels | None:
    if config.inner_shard == 0:
        return None
    # Ranks that split states are neighbours, whatever else the mesh has.
    shape = (world_size // config.state_degree, config.state_degree // config.inner_shard, config.inner_shard)
    axes = init_device_mesh(device.type, shape, mesh_dim_names=("others", "outer", "inner"))
    return Levels(_axis(axes, "inner", timeout), _axis(axes, "outer", timeout))


def _axis(axes: DeviceMesh, name: str, timeout: datetime.timedelta) -> Axis:
    group = axes.get_group(name)
    return Axis(tuple(dist.get_process_group_ranks(group)), axes.get_local_rank(name), group, timeout)
