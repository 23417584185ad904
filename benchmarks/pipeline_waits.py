"""Simulated against real: stages whose work is a timed wait, carried out by `parallel.pipeline` on 4 gloo ranks."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rowwise.parallel.defer as defer
from rowwise.parallel.mesh import ParallelConfig, Workers, make_mesh
from rowwise.parallel.pipeline import Pipeline
from rowwise.parallel.schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.schedule.order import Schedule
from rowwise.parallel.schedule.search import find_schedule
from rowwise.parallel.schedule.simulate import simulate, uniform_costs
from rowwise.parallel.schedule.trace import align

RANKS, MICRO_BATCHES, ROUNDS = 4, 12, 3
SECONDS = 0.03  # of F, of I and of W, for all the stages of a rank
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


def one_rank(rank: int, ranks: int, port: int) -> dict[str, list[float]]:
    """Schedule -> the makespan of each round, in seconds."""
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
    found: dict[str, list[float]] = {}
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
        for _ in range(ROUNDS):
            dist.barrier()
            spans: list[Any] = []
            pipeline.forward_backward(forward, lambda: torch.empty(1, 8), 1.0, spans)
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, spans)
            found.setdefault(label, []).append(align(everyone).makespan)
    dist.destroy_process_group()
    return found


def run(on_ranks: Callable[..., Any]) -> dict[str, Any]:
    """Simulated and measured makespans, and the pairs of schedules whose order differs."""
    measured = {label: median(rounds) for label, rounds in on_ranks(one_rank, RANKS).items()}
    simulated = {}
    for label, schedule in schedules().items():
        each = SECONDS * RANKS / schedule.stages
        simulated[label] = simulate(schedule, uniform_costs(schedule.stages, each, each, each)).makespan
    # Schedules less than 3 % apart are as good as equal.
    swapped = [
        [a, b] for a in simulated for b in simulated if simulated[a] * 1.03 < simulated[b] and measured[a] > measured[b]
    ]
    return {
        "ranks": RANKS,
        "micro_batches": MICRO_BATCHES,
        "seconds": SECONDS,
        "schedules": {
            label: {
                "simulated": simulated[label],
                "measured": measured[label],
                "ratio": measured[label] / simulated[label],
            }
            for label in simulated
        },
        "in_another_order": swapped,
    }


def show(found: dict[str, Any]) -> str:
    lines = [f"{'schedule':<28}{'simulated':>11}{'measured':>10}{'ratio':>8}"]
    for label, row in sorted(found["schedules"].items(), key=lambda item: item[1]["simulated"]):
        lines.append(f"{label:<28}{row['simulated']:>11.3f}{row['measured']:>10.3f}{row['ratio']:>8.3f}")
    return "\n".join([*lines, f"in another order: {found['in_another_order'] or 'none'}"])
