"""A run on devices: what each place of its pipeline holds, whether that fits, and how long a step takes."""

import functools
from dataclasses import dataclass, replace

from rowwise.parallel.config import ParallelConfig
from rowwise.trainer.adapters.specs import with_likely_forms
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.models.config import ModelConfig
from rowwise.trainer.plan.clock import Clock
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.memory import Memory, memory_of, worst
from rowwise.trainer.plan.reserve import Room, room_of
from rowwise.trainer.plan.time import Seconds, forecast_seconds
from rowwise.trainer.stages import Plan, plan_pipeline


@dataclass(frozen=True)
class Forecast:
    """Of a checked run: `memories`, of the first rank of each place of the pipeline, and the `room` of the one that holds most."""

    config: TrainConfig
    device: Device
    plan: Plan | None
    memories: list[Memory]
    room: Room
    seconds: Seconds

    @property
    def worst(self) -> Memory:
        return worst(self.memories)


def forecast(config: TrainConfig, device: Device, ends: bool = False) -> Forecast:
    """Forecasts a run. `config`: checked; `ends`: of a pipeline look at the first place and the last alone, one of which holds the
    most. Raises ValueError for layers that do not say what they keep."""
    config = with_likely_forms(config)
    plan = plan_for(config, device)
    parallel = config.parallel
    each = parallel.data_degree * parallel.ring * parallel.ulysses
    places = sorted({0, parallel.pipeline - 1}) if ends else range(parallel.pipeline)
    memories = [memory_of(config, place * each, device.cuda, plan) for place in places]
    room = room_of(worst(memories), device, config.memory.limit)
    return Forecast(config, device, plan, memories, room, forecast_seconds(config, device, plan))


def plan_for(config: TrainConfig, device: Device) -> Plan | None:
    """Finds the stages and the order of a pipeline; that of `auto` is found for the times that parts are forecast to take."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return None
    if parallel.pipeline_schedule == "auto":
        times = Clock(config, device).part_times()
        return plan_pipeline(parallel, config.model, config.batch.seq_len, config.micro_batches, times)
    alike = replace(parallel, shard=1, replicate=1, ulysses=1, ring=1, ring_order=None, zero=1)
    return _planned(alike, config.model, config.batch.seq_len, config.micro_batches)


@functools.lru_cache(maxsize=256)  # a search asks for the same again and again, and to cut layers takes a while
def _planned(parallel: ParallelConfig, model: ModelConfig, seq_len: int, micro_batches: int) -> Plan:
    return plan_pipeline(parallel, model, seq_len, micro_batches, None)
