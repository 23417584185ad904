"""Simulated against real: stages whose work is a timed wait, carried out by `parallel.pipeline` on 4 gloo ranks."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import RESULTS
from torch import Tensor, nn

import rowwise.parallel.defer as defer
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.parallel.pipeline import Pipeline, Trace
from rowwise.parallel.pipeline_schedule.gantt import draw
from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Schedule
from rowwise.parallel.pipeline_schedule.search import find_schedule
from rowwise.parallel.pipeline_schedule.simulate import period, simulate, uniform_costs
from rowwise.parallel.pipeline_schedule.trace import align

RANKS, MICRO_BATCHES, ROUNDS = 4, 12, 3
STEPS = 5  # in a row, where ranks do or do not wait for each other before their optimizer step
OPTIMIZER = 0.06  # seconds of it
SECONDS = 0.03  # of F, of I and of W, for all the stages of a rank
PICTURE = "zb_v, 2 chunks"
SHAPES = {name: 2 if generator.chunks[0] == 2 else 1 for name, generator in GENERATORS.items()}


class Wait(torch.autograd.Function):
    """Waits in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return dy, None, None


def schedules() -> dict[str, Schedule]:
    """Every schedule by name, some with two chunks too, and what `auto` finds for these times within two limits."""
    made = {}
    for name, chunks in [*SHAPES.items(), ("gpipe", 2), ("blockwise", 2)]:
        label = f"{name}, {chunks} chunks" if chunks > 1 else name
        made[label] = make_schedule(name, Shape(RANKS, chunks, MICRO_BATCHES, RANKS))
    for times in (1, 2):
        shape = Shape(RANKS, 1, MICRO_BATCHES)
        made[f"auto, {times} x memory"] = find_schedule(shape, uniform_costs(RANKS), times * RANKS).schedule
    return made


def one_rank(rank: int, ranks: int, port: int) -> dict[str, dict[str, Any]]:
    """Schedule -> the makespan of each round, and a step of many in a row, in seconds."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    mesh = make_mesh(ParallelConfig(pipeline=ranks, shard=1), Workers(rank, ranks, rank, ranks, store))
    assert mesh.pipeline is not None
    weight = nn.Parameter(torch.eye(8))
    add, pause = defer.add_weight_gradient_, [0.0]

    def slow_weight_gradient_(weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
        time.sleep(pause[0])
        add(weight, x, dy)

    defer.add_weight_gradient_ = slow_weight_gradient_
    found: dict[str, dict[str, Any]] = {}
    for label, schedule in schedules().items():
        each = SECONDS * ranks / schedule.stages
        pause[0] = each
        split = {action[::2] for actions in schedule.ranks for action in actions if action.kind == "I"}

        def forward(stage: int, i: int, x: Tensor | None, each=each, split=split, last=schedule.stages - 1) -> Tensor:
            given = torch.zeros(1, 8, requires_grad=True) if x is None else x
            y = F.linear(Wait.apply(given, each, each if (stage, i) in split else 2 * each), weight)
            return y.sum() if stage == last else y

        modules: dict[int, nn.Module] = {stage: nn.Identity() for stage in schedule.stages_of(mesh.pipeline.rank)}
        pipeline = Pipeline(modules, schedule, mesh.pipeline, "none", mesh.device)
        timelines = []
        for _ in range(ROUNDS):
            dist.barrier()
            trace = Trace(mesh.device)
            pipeline.forward_backward(forward, buffer, 1.0, trace)
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, trace.spans())
            timelines.append(align(everyone))
        found[label] = {
            "timelines": timelines,
            "synchronised": in_a_row(pipeline, forward, ahead=False),
            "unsynchronised": in_a_row(pipeline, forward, ahead=True),
        }
    dist.destroy_process_group()
    return found


def buffer() -> Tensor:
    return torch.empty(1, 8)


def in_a_row(pipeline: Pipeline, forward: Any, ahead: bool) -> float:
    """Seconds of a step in the steady state, the optimizer's wait included; `ahead`: as `trainer.update.step_at_once` does
    it, else every rank waits for the global norm before its optimizer steps."""
    dist.barrier()
    ends = []
    step = pipeline.begin(forward, buffer)
    for number in range(STEPS):
        pipeline.finish(step, 1.0)
        norm = dist.all_reduce(torch.ones(1), async_op=True)
        assert norm is not None
        if not ahead:
            norm.wait()
        time.sleep(OPTIMIZER)
        if number + 1 < STEPS:
            step = pipeline.begin(forward, buffer)
        norm.wait()
        ends.append(time.perf_counter())
    # The first step fills the pipeline and the last drains it.
    return (ends[-2] - ends[0]) / (STEPS - 2)


def run(on_ranks: Callable[..., Any]) -> dict[str, Any]:
    """Simulated and measured: the makespan of one step, and steps in a row; and the pairs whose order differs."""
    measured = on_ranks(one_rank, RANKS)
    rows: dict[str, dict[str, Any]] = {}
    for label, schedule in schedules().items():
        each = SECONDS * RANKS / schedule.stages
        costs = uniform_costs(schedule.stages, each, each, each, step=OPTIMIZER)
        timelines = measured[label]["timelines"]
        rows[label] = {"one step": pair(simulate(schedule, costs).makespan, median(t.makespan for t in timelines))}
        for wait in ("synchronised", "unsynchronised"):
            rows[label][wait] = pair(period(schedule, costs, wait == "synchronised")[0], measured[label][wait])
    one = {label: row["one step"] for label, row in rows.items()}
    # Schedules less than 3 % apart are as good as equal.
    swapped = [
        [a, b]
        for a in one
        for b in one
        if one[a]["simulated"] * 1.03 < one[b]["simulated"] and one[a]["measured"] > one[b]["measured"]
    ]
    schedule = schedules()[PICTURE]
    predicted = simulate(schedule, uniform_costs(schedule.stages, *[SECONDS * RANKS / schedule.stages] * 3))
    draw({"predicted": predicted, "measured": measured[PICTURE]["timelines"][-1]}, RESULTS / "pipeline.png", "seconds")
    sizes = {"ranks": RANKS, "micro_batches": MICRO_BATCHES, "seconds": SECONDS, "optimizer_seconds": OPTIMIZER}
    return {**sizes, "schedules": rows, "in_another_order": swapped}


def pair(simulated: float, measured: float) -> dict[str, float]:
    return {"simulated": simulated, "measured": measured, "ratio": measured / simulated}


def show(found: dict[str, Any]) -> str:
    kinds = ("one step", "synchronised", "unsynchronised")
    lines = [f"{'simulated, measured, ratio':<28}" + "".join(f"{kind:>24}" for kind in kinds)]
    for label, row in sorted(found["schedules"].items(), key=lambda item: item[1]["one step"]["simulated"]):
        cells = (f"{row[k]['simulated']:>9.3f}{row[k]['measured']:>8.3f}{row[k]['ratio']:>7.3f}" for k in kinds)
        lines.append(f"{label:<28}" + "".join(cells))
    return "\n".join([*lines, f"in another order: {found['in_another_order'] or 'none'}"])
