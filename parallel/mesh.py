"""Names the axes of the mesh, checks their product, and makes the process groups: the only place that does.

    pipeline x replicate x shard x ulysses x ring = world size

Data is split over (replicate, shard); states are split over shard. The pipeline axis varies slowest: its messages are
the fewest, so they may cross machines.
"""

import datetime
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NOT_BUILT = ("ulysses", "ring")
GATHERING = Literal["micro_batch", "run"]


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the axes; `shard=-1` takes what the others leave. `zero`: what is split over the shard axis
    (0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters).

    `pipeline_schedule`: a name, `auto`, or the path of a CSV; `virtual_stages`: stages a rank; `pipeline_unit`: the
    micro-batches of a unit of `blockwise` (null: as many as ranks). `pipeline_gather`: at stage 3, whether blocks are
    gathered for each micro-batch (`micro_batch`, least memory) or a rank's stage for a run of its actions (`run`, fewest
    messages; null: `run` for blockwise). For `auto`, `pipeline_memory` is how many times the activations of 1f1b a rank
    may hold, and `pipeline_costs` a JSON file of measured times (null: they are measured). `pipeline_trace`: the step
    whose timeline is kept (0: none). `post_validation`: ranks step without waiting for the global norm, and undo it where
    that was wrong."""

    replicate: int = 1
    shard: int = -1
    zero: int = 1
    pipeline: int = 1
    pipeline_schedule: str = "1f1b"
    virtual_stages: int = 1
    pipeline_unit: int | None = None
    pipeline_gather: GATHERING | None = None
    pipeline_memory: float = 1.0
    pipeline_costs: str | None = None
    pipeline_trace: int = 0
    post_validation: bool = False
    ulysses: int = 1
    ring: int = 1
    backend: Literal["torch"] = "torch"


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
class PipelineAxis:
    """The ranks that hold the stages of this rank's replica (`ranks[i]`: the global rank of the i-th), this rank's place
    among them, and the group of all of them."""

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """The axes of this run, seen from one rank.

    `states` is the (replicate, shard) device mesh over which parameters, gradients and optimizer states are laid;
    `pipeline` is None where the model is not cut; `save_group` is a gloo group of its own for the thread that writes
    checkpoints, so that its messages never mix with those of a step.
    """

    rank: int
    world_size: int
    device: torch.device
    states: DeviceMesh
    pipeline: PipelineAxis | None
    save_group: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads, out of `data_degree`. All stages of a replica read the same."""
        return self.rank % self.data_degree

    @property
    def data_degree(self) -> int:
        return self.world_size // (1 if self.pipeline is None else self.pipeline.size)

    @property
    def state_replicas(self) -> int:
        """How many ranks hold each shard of a state."""
        return self.states.size(0)


def resolve_degrees(config: ParallelConfig, world_size: int) -> ParallelConfig:
    """`config` with `shard=-1` filled in. Raises ValueError where the degrees do not multiply to the world size."""
    for key in NOT_BUILT:
        if (degree := getattr(config, key)) != 1:
            raise ValueError(f"parallel.{key}={degree}: not built yet; possible is parallel.{key}=1")
    if config.zero not in (0, 1, 2, 3):
        raise ValueError(f"parallel.zero={config.zero}: possible are 0, 1, 2 and 3")
    if config.replicate < 1 or config.pipeline < 1 or (config.shard < 1 and config.shard != -1):
        raise ValueError(
            f"parallel.replicate={config.replicate} parallel.pipeline={config.pipeline} parallel.shard={config.shard}: "
            "degrees are at least 1 (shard=-1 takes what is left)"
        )
    if config.shard != -1:
        product = config.pipeline * config.replicate * config.shard
        if product != world_size:
            raise ValueError(
                f"{_given(config)} x parallel.shard={config.shard} = {product} workers, but the world size is "
                f"{world_size}; start {product} workers or give parallel.shard=-1"
            )
        return config
    if world_size % (config.pipeline * config.replicate):
        raise ValueError(
            f"{_given(config)} does not divide the world size {world_size}; possible are {divisors(world_size)}"
        )
    return replace(config, shard=world_size // (config.pipeline * config.replicate))


def _given(config: ParallelConfig) -> str:
    degrees = {"pipeline": config.pipeline, "replicate": config.replicate}
    return " x ".join(f"parallel.{k}={v}" for k, v in degrees.items() if v > 1 or k == "replicate")


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def pick_device(local_rank: int) -> torch.device:
    """This worker's device: the GPU of its local rank, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"worker {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            f"start at most that many workers a machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


def make_mesh(config: ParallelConfig, workers: Workers) -> Mesh:
    """Makes the process groups (NCCL on GPUs, gloo on the CPU) and names the axes. `config` must be resolved."""
    device = pick_device(workers.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=workers.store if workers.store is not None else dist.HashStore(),
        rank=workers.rank,
        world_size=workers.world_size,
        # A peer that dies ends the job through torchrun; this bound is for one that hangs.
        timeout=datetime.timedelta(minutes=30),
    )
    data_degree = config.replicate * config.shard
    # At stage 0 nothing is split: every rank of both axes is a replica.
    shape = (config.replicate, config.shard) if config.zero > 0 else (data_degree, 1)
    axes = init_device_mesh(device.type, (config.pipeline, *shape), mesh_dim_names=("pipeline", "replicate", "shard"))
    return Mesh(
        rank=workers.rank,
        world_size=workers.world_size,
        device=device,
        states=axes["replicate", "shard"],
        pipeline=_pipeline_axis(axes) if config.pipeline > 1 else None,
        save_group=dist.new_group(backend="gloo"),
    )


def _pipeline_axis(axes: DeviceMesh) -> PipelineAxis:
    group = axes.get_group("pipeline")
    return PipelineAxis(tuple(dist.get_process_group_ranks(group)), axes.get_local_rank("pipeline"), group)


Pair = tuple[int, int]  # places on the pipeline axis: who sends, who receives


@dataclass(frozen=True)
class Lane:
    """What the messages of one sender to one receiver go through, in order and without waiting for other messages."""

    group: dist.ProcessGroup
    tag: int


def make_lanes(axis: PipelineAxis, pairs: set[Pair], device: torch.device) -> dict[Pair, Lane]:
    """A lane for each of `pairs`. All ranks of the axis must call it with the same pairs.

    Pairs that share a rank get different numbers. With gloo the number is a tag; NCCL knows no tags, and keeps the
    messages of a group in one queue, so there each number is a group of the whole axis.
    """
    numbers: dict[Pair, int] = {}
    for pair in sorted(pairs):
        taken = {number for other, number in numbers.items() if set(other) & set(pair)}
        numbers[pair] = next(n for n in range(len(pairs)) if n not in taken)
    if device.type != "cuda":
        return {pair: Lane(axis.group, number) for pair, number in numbers.items()}
    count = max(numbers.values(), default=-1) + 1
    groups = [dist.new_group(list(axis.ranks), use_local_synchronization=True) for _ in range(count)]
    return {pair: Lane(groups[number], 0) for pair, number in numbers.items()}
