"""What a pipeline does with a model: which layers each stage has, and in which order stages work."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.pipeline_schedule.check import check_schedule
from rowwise.parallel.pipeline_schedule.cut import balance
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, check_shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Schedule, loop_placement, parse_action, read_csv, v_placement
from rowwise.parallel.pipeline_schedule.search import find_schedule
from rowwise.parallel.pipeline_schedule.simulate import Costs, Gathering, Timeline
from rowwise.trainer.files import from_json, to_json, write_whole
from rowwise.trainer.measure import PartTimes, read_part_times, write_part_times
from rowwise.trainer.models.config import ModelConfig, model_of, plain_of
from rowwise.trainer.models.decoder import layer_flops

PLAN_FILE = "plan.json"
PLAN_KEYS = (
    "pipeline_schedule",
    "virtual_stages",
    "pipeline_unit",
    "pipeline_gather",
    "pipeline_memory",
    "pipeline_costs",
)
SEQUENCE_KEYS = ("ulysses", "ring", "ring_order")
PIPELINE_KEYS = (*PLAN_KEYS, "pipeline_trace", "post_validation")


@dataclass(frozen=True)
class Plan:
    """How a model is cut and in which order its stages work. `layers[s]`: those of stage s; `how`: what `auto` found it
    by."""

    schedule: Schedule
    layers: list[range]
    how: str = ""


_PLAIN = ParallelConfig()


def _has(key: str) -> Callable[[Any], bool]:
    """Whether a run has another value of `parallel.KEY` than the one that means nothing."""
    return lambda run: getattr(run.parallel, key) != getattr(_PLAIN, key)


def _without_pipeline(key: str) -> Refusal:
    return Refusal(
        (f"parallel.{key}", "parallel.pipeline"),
        lambda run: run.parallel.pipeline == 1 and _has(key)(run),
        f"parallel.{key}={{parallel.{key}}} with parallel.pipeline=1: there is no pipeline; give parallel.pipeline, or leave "
        f"parallel.{key}={getattr(_PLAIN, key)}",
    )


def _for_auto_alone(key: str) -> Refusal:
    return Refusal(
        (f"parallel.{key}", "parallel.pipeline_schedule"),
        lambda run: run.parallel.pipeline_schedule != "auto" and _has(key)(run),
        f"parallel.{key}={{parallel.{key}}} with {{parallel.pipeline_schedule}}: only auto looks at it; give "
        "parallel.pipeline_schedule=auto",
    )


WITHOUT_PIPELINE: Refusals = (
    Refusal(
        ("parallel.virtual_stages",),
        lambda run: run.parallel.virtual_stages < 1,
        "parallel.virtual_stages={parallel.virtual_stages}: it is at least 1",
    ),
    *map(_without_pipeline, PIPELINE_KEYS),
)
PIPELINED: Refusals = (
    Refusal(
        ("parallel.pipeline_gather", "parallel.zero", "parallel.shard", "parallel.ring", "parallel.ulysses"),
        lambda run: run.parallel.pipeline_gather is not None and _for_gathering(run),
        lambda run: (
            f"parallel.pipeline_gather={run.parallel.pipeline_gather} with parallel.zero={run.parallel.zero}, split "
            f"over shard x ring x ulysses = {run.parallel.state_degree}: below stage 3 weights are gathered once a step, and "
            "where one rank has them all not at all; leave it null, or give "
            f"{' and '.join(_for_gathering(run))}"
        ),
    ),
    *map(_for_auto_alone, ("pipeline_memory", "pipeline_costs")),
    Refusal(
        ("parallel.pipeline_trace", "steps"),
        lambda run: not 0 <= run.parallel.pipeline_trace <= run.steps,
        "parallel.pipeline_trace={parallel.pipeline_trace}: a step of the {steps}, counted from 1, or 0 for none",
    ),
    Refusal(
        ("parallel.pipeline_unit", "parallel.pipeline_schedule"),
        lambda run: run.parallel.pipeline_unit is not None and run.parallel.pipeline_schedule != "blockwise",
        "parallel.pipeline_unit={parallel.pipeline_unit} with {parallel.pipeline_schedule}: only blockwise has units; leave "
        "it null",
    ),
)
COMPILED_STAGES: Refusals = (
    Refusal(
        ("compile", "parallel.pipeline_schedule"),
        lambda run: run.compile and run.parallel.pipeline > 1 and splits_backward(run.parallel, run.micro_batches),
        "compile=true with parallel.pipeline_schedule={parallel.pipeline_schedule}: a compiled block computes its "
        "input and weight gradients together; give compile=false, or gpipe, 1f1b or interleaved_1f1b",
    ),
)


def _for_gathering(run: Any) -> list[str]:
    """What a pipeline lacks for weights to be gathered as it goes."""
    config, away = run.parallel, run.memory.offload_params != "none"
    split = [] if config.state_degree > 1 or away else ["parallel.shard, ring or ulysses above 1"]
    return ["parallel.zero=3"] * (config.zero != 3) + split


def check_pipeline(config: ParallelConfig, micro_batches: int) -> None:
    """Refuses a schedule that there is not, or that cannot be carried out. Raises ValueError."""
    name = config.pipeline_schedule
    if name in GENERATORS:
        check_shape(name, shape_of(config, micro_batches))
    elif name == "auto":
        _check_auto(config, micro_batches)
    elif _path(name).suffix == ".csv":
        stages = config.pipeline * config.virtual_stages
        check_schedule(read_csv(_path(name)), config.pipeline, stages, micro_batches)
    else:
        raise ValueError(
            f"parallel.pipeline_schedule={name}: possible are {', '.join([*GENERATORS, 'auto'])}, or the path of a .csv file"
        )


def _check_auto(config: ParallelConfig, micro_batches: int) -> None:
    if config.virtual_stages > 2:
        raise ValueError(
            f"parallel.pipeline_schedule=auto with parallel.virtual_stages={config.virtual_stages}: possible are 1 and 2"
        )
    if micro_batches < config.pipeline:
        raise ValueError(
            f"parallel.pipeline_schedule=auto on {config.pipeline} ranks needs at least {config.pipeline} micro-batches a "
            f"step and there are {micro_batches}; give a larger batch.global_size or a smaller batch.micro_size"
        )
    if not config.pipeline_memory >= 1 / config.pipeline:
        raise ValueError(
            f"parallel.pipeline_memory={config.pipeline_memory}: 1 is what 1f1b holds, {config.pipeline} micro-batches; "
            f"the least is one, 1/{config.pipeline}"
        )
    if config.pipeline_costs is not None:
        read_part_times(_path(config.pipeline_costs))


def _path(given: str) -> Path:
    return Path(given).expanduser()


def shape_of(config: ParallelConfig, micro_batches: int) -> Shape:
    """Returns what the schedule is made for."""
    unit = config.pipeline if config.pipeline_unit is None else config.pipeline_unit
    return Shape(config.pipeline, config.virtual_stages, micro_batches, unit)


def plan_pipeline(
    config: ParallelConfig, model: ModelConfig, seq_len: int, micro_batches: int, times: PartTimes | None
) -> Plan:
    """Returns the cut and the order of work. `auto` needs `times`; the cut is by counted operations without."""
    stages = config.pipeline * config.virtual_stages
    if times is None:
        before, layer, after = layer_flops(model, seq_len)
    else:
        before, layer, after = times.before.total, times.layer.total, times.after.total
    layers = balance(before, [layer] * model.layers, after, stages)
    name = config.pipeline_schedule
    if name != "auto":
        named = name in GENERATORS
        return Plan(make_schedule(name, shape_of(config, micro_batches)) if named else read_csv(_path(name)), layers)
    assert times is not None
    first_rank = balance(before, [layer] * model.layers, after, config.pipeline)
    limit = config.pipeline_memory * max((config.pipeline - rank) * len(own) for rank, own in enumerate(first_rank))
    # One micro-batch is the least that a rank can hold, however its stages are placed.
    placements = [loop_placement(config.pipeline, config.virtual_stages)]
    if config.virtual_stages == 2:
        placements.append(v_placement(config.pipeline))
    limit = max(limit, min(max(sum(len(layers[s]) for s in own) for own in placement) for placement in placements))
    found = find_schedule(shape_of(config, micro_batches), costs_of(times, layers), limit, gathering=gathering(config))
    return Plan(found.schedule, layers, found.how)


def costs_of(times: PartTimes, layers: list[range]) -> Costs:
    """Returns what each stage takes. Activations are counted in layers; all of them are taken to wait for W."""
    counts = [len(own) for own in layers]

    def seconds(kind: str) -> tuple[float, ...]:
        each = [count * getattr(times.layer, kind) for count in counts]
        each[0] += getattr(times.before, kind)
        each[-1] += getattr(times.after, kind)
        return tuple(each)

    return Costs(
        forward=seconds("forward"),
        input=seconds("input"),
        weight=seconds("weight"),
        gather=tuple(count * times.gather for count in counts),
        held=tuple(map(float, counts)),
        kept=tuple(map(float, counts)),
        send=times.send,
    )


def gathering(config: ParallelConfig) -> Gathering:
    """Says how weights are gathered: see `parallel.pipeline`."""
    if config.zero < 3:
        return "none"
    return config.pipeline_gather or ("run" if config.pipeline_schedule == "blockwise" else "micro_batch")


def splits_backward(config: ParallelConfig, micro_batches: int) -> bool:
    """Says whether the schedule computes weight gradients apart. (What `auto` will choose is not known; it may.)"""
    name = config.pipeline_schedule
    if name in GENERATORS:
        return make_schedule(name, shape_of(config, micro_batches)).splits_backward
    return name == "auto" or read_csv(_path(name)).splits_backward


def save_plan(plan: Plan, times: PartTimes, made_for: dict[str, Any], folder: Path) -> None:
    """Writes what `auto` found into a run's pipeline/ folder, all that is read again in one file, whole or not at all;
    and the times that it was found for."""
    folder.mkdir(parents=True, exist_ok=True)
    write_part_times(times, folder / "times.json")
    saved = {
        "how": plan.how,
        "made_for": made_for,
        "layers": [[own.start, own.stop] for own in plan.layers],
        "schedule": [[str(action) for action in actions] for actions in plan.schedule.ranks],
    }
    write_whole(folder / PLAN_FILE, to_json(saved, indent=1))


def saved_plan(made_for: dict[str, Any], ranks: int, stages: int, micro_batches: int, folder: Path) -> Plan | None:
    """Returns the plan that a run has, if it was made for this: a resumed run goes on in the same order, to the last bit. One
    that is damaged is none, with a warning."""
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        saved = from_json(path.read_bytes())
        # What an earlier release did not know of models was as it is by default.
        saved["made_for"]["model"] = plain_of(model_of(saved["made_for"]["model"]))
        if saved["made_for"] != made_for:
            return None
        rows = tuple(tuple(parse_action(cell) for cell in row) for row in saved["schedule"])
        plan = Plan(Schedule(rows, str(path)), [range(*own) for own in saved["layers"]], saved["how"])
        check_schedule(plan.schedule, ranks, stages, micro_batches)
        if [layer for own in plan.layers for layer in own] != list(range(made_for["model"]["layers"])):
            raise ValueError("its stages do not hold every layer once")
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({error}); the schedule is planned anew", stacklevel=1)
        return None
    return plan


def write_costs(costs: Costs, folder: Path) -> None:
    """Writes what each stage takes, for pictures of what was predicted."""
    (folder / "costs.json").write_text(json.dumps(asdict(costs), indent=2) + "\n")


def measured_costs(timeline: Timeline) -> Costs:
    """Returns what each stage took in a measured step: means over micro-batches; a B counts as I and W in equal parts."""
    spent: dict[tuple[int, str], list[float]] = {}
    for actions, starts, ends in zip(timeline.schedule.ranks, timeline.starts, timeline.ends, strict=True):
        for action, start, end in zip(actions, starts, ends, strict=True):
            for kind in {"B": "IW"}.get(action.kind, action.kind):
                spent.setdefault((action.stage, kind), []).append((end - start) / (2 if action.kind == "B" else 1))
    stages = range(timeline.schedule.stages)
    forward, input_, weight = (tuple(sum(spent[s, kind]) / len(spent[s, kind]) for s in stages) for kind in "FIW")
    ones = (1.0,) * len(stages)
    return Costs(forward, input_, weight, gather=(0.0,) * len(stages), held=ones, kept=ones)
