"""What a pipeline does with a model: which layers each stage has, and in which order stages work."""

from dataclasses import dataclass
from pathlib import Path

from rowwise.parallel.mesh import ParallelConfig
from rowwise.parallel.schedule.check import check_schedule
from rowwise.parallel.schedule.cut import balance
from rowwise.parallel.schedule.generate import GENERATORS, Shape, check_shape, make_schedule
from rowwise.parallel.schedule.order import Schedule, read_csv
from rowwise.parallel.schedule.simulate import Gathering
from rowwise.trainer.models.decoder import ModelConfig, layer_flops

PIPELINE_KEYS = (
    "pipeline_schedule",
    "virtual_stages",
    "pipeline_unit",
    "pipeline_gather",
    "pipeline_memory",
    "pipeline_costs",
    "pipeline_trace",
    "post_validation",
)


@dataclass(frozen=True)
class Plan:
    """How a model is cut and in which order its stages work. `layers[s]`: those of stage s."""

    schedule: Schedule
    layers: list[range]


def check_pipeline(config: ParallelConfig, layers: int, micro_batches: int) -> None:
    """Refuses a pipeline that cannot be. Raises ValueError."""
    if config.virtual_stages < 1:
        raise ValueError(f"parallel.virtual_stages={config.virtual_stages}: it is at least 1")
    if config.pipeline == 1:
        _refuse_without_pipeline(config)
        return
    balance(0, [1] * layers, 0, config.pipeline * config.virtual_stages)
    if config.pipeline_gather is not None and config.zero != 3:
        raise ValueError(
            f"parallel.pipeline_gather={config.pipeline_gather} with parallel.zero={config.zero}: below 3 weights are "
            "gathered once a step; leave it null, or give parallel.zero=3"
        )
    name = config.pipeline_schedule
    if config.pipeline_unit is not None and name != "blockwise":
        raise ValueError(
            f"parallel.pipeline_unit={config.pipeline_unit} with {name}: only blockwise has units; leave it null"
        )
    if name in GENERATORS:
        check_shape(name, shape_of(config, micro_batches))
    elif Path(name).suffix == ".csv":
        stages = config.pipeline * config.virtual_stages
        check_schedule(read_csv(Path(name).expanduser()), config.pipeline, stages, micro_batches)
    else:
        raise ValueError(
            f"parallel.pipeline_schedule={name}: possible are {', '.join([*GENERATORS, 'auto'])}, or the path of a .csv file"
        )


def _refuse_without_pipeline(config: ParallelConfig) -> None:
    plain = ParallelConfig()
    for key in PIPELINE_KEYS:
        if (given := getattr(config, key)) != getattr(plain, key):
            raise ValueError(
                f"parallel.{key}={given} with parallel.pipeline=1: there is no pipeline; give parallel.pipeline, or leave "
                f"parallel.{key}={getattr(plain, key)}"
            )


def shape_of(config: ParallelConfig, micro_batches: int) -> Shape:
    """What the schedule is made for."""
    unit = config.pipeline if config.pipeline_unit is None else config.pipeline_unit
    return Shape(config.pipeline, config.virtual_stages, micro_batches, unit)


def plan_pipeline(config: ParallelConfig, model: ModelConfig, seq_len: int, micro_batches: int) -> Plan:
    """The same on one rank."""
    before, layer, after = layer_flops(model, seq_len)
    layers = balance(before, [layer] * model.layers, after, config.pipeline * config.virtual_stages)
    name = config.pipeline_schedule
    if name in GENERATORS:
        schedule = make_schedule(name, shape_of(config, micro_batches))
    else:
        schedule = read_csv(Path(name).expanduser())
    return Plan(schedule, layers)


def gathering(config: ParallelConfig) -> Gathering:
    """How weights are gathered: see `parallel.pipeline`."""
    if config.zero < 3:
        return "none"
    return config.pipeline_gather or ("run" if config.pipeline_schedule == "blockwise" else "micro_batch")


def splits_backward(config: ParallelConfig, micro_batches: int) -> bool:
    """Whether the schedule computes weight gradients apart. (What `auto` will choose is not known; it may.)"""
    name = config.pipeline_schedule
    if name in GENERATORS:
        return make_schedule(name, shape_of(config, micro_batches)).splits_backward
    return name == "auto" or read_csv(Path(name).expanduser()).splits_backward
