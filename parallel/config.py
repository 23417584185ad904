"""The degrees of the mesh as they are configured, and what they must multiply to."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.parallel.accelerate.config import ENGINE, DeepSpeedConfig

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

    `quantize_gather`: in which form matrices cross the shard axis to be gathered: `none`, as they compute; `int8`, as 8-bit
    codes with a scale for every 256 numbers of a row: every layout, one process too, computes with the rounded weights, and what
    is stepped and saved is exact. `inner_shard`: at `zero=3`, the neighbours (a machine's ranks, say) that keep a copy of the
    gathered weights between them for the rest of a step, so that weights cross machines once a step; 0: no copy.
    `quantize_reduce`: in which form gradients of matrices cross the shard axis: `none`, as they are summed; `int8` or `int4`, as
    codes rounded at random, with `inner_shard` first among those neighbours and then between machines: right on the mean, and
    another run on another layout. See docs/quantised-messages.md.

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
    quantize_gather: MayChange[Literal["none", "int8"]] = "none"
    inner_shard: MayChange[int] = 0
    quantize_reduce: MayChange[Literal["none", "int8", "int4"]] = "none"
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
