"""Names the axes of the mesh, checks their product, and makes the process groups: the only place that does.

    replicate x shard x pipeline x ulysses x ring = world size

Data is split over (replicate, shard); states are split over shard.
"""

import datetime
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NOT_BUILT = ("pipeline", "ulysses", "ring")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the axes; `shard=-1` takes what the others leave. `zero`: what is split over the shard axis
    (0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters)."""

    replicate: int = 1
    shard: int = -1
    zero: int = 1
    pipeline: int = 1
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
class Mesh:
    """The axes of this run, seen from one rank.

    `states` is the (replicate, shard) device mesh over which parameters, gradients and optimizer states are laid;
    `save_group` is a gloo group of its own for the thread that writes checkpoints, so that its messages never mix
    with those of a step.
    """

    rank: int
    world_size: int
    device: torch.device
    states: DeviceMesh
    save_group: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which share of each global batch this rank reads, out of `data_degree`."""
        return self.rank

    @property
    def data_degree(self) -> int:
        return self.world_size

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
    if config.replicate < 1 or (config.shard < 1 and config.shard != -1):
        raise ValueError(
            f"parallel.replicate={config.replicate} parallel.shard={config.shard}: degrees are at least 1 "
            "(shard=-1 takes what is left)"
        )
    if config.shard == -1:
        if world_size % config.replicate:
            raise ValueError(
                f"parallel.replicate={config.replicate} does not divide the world size {world_size}; "
                f"possible are {divisors(world_size)}"
            )
        return replace(config, shard=world_size // config.replicate)
    if config.replicate * config.shard != world_size:
        raise ValueError(
            f"parallel.replicate={config.replicate} x parallel.shard={config.shard} = "
            f"{config.replicate * config.shard} workers, but the world size is {world_size}; "
            f"start {config.replicate * config.shard} workers or give parallel.shard=-1"
        )
    return config


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
    # At stage 0 nothing is split: every rank of both axes is a replica.
    shape = (config.replicate, config.shard) if config.zero > 0 else (workers.world_size, 1)
    return Mesh(
        rank=workers.rank,
        world_size=workers.world_size,
        device=device,
        states=init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")),
        save_group=dist.new_group(backend="gloo"),
    )
