"""One schedule, two runtimes: `parallel.pipeline` and torch.distributed.pipelining's, on 2 gloo ranks, in turns.

Both train the same stages of a small decoder on the same micro-batches; seconds of a step, and the most bytes of what a
step makes and holds (activations, gradients, messages), on the rank that holds most.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from rowwise.kernels.cross_entropy import cross_entropy
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.mesh import Axis, Workers, make_mesh
from rowwise.parallel.pipeline import Pipeline
from rowwise.parallel.pipeline_schedule.generate import Shape, make_schedule
from rowwise.parallel.pipeline_schedule.order import Schedule
from rowwise.trainer.models.decoder import Decoder, ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from live_bytes import LiveBytes

RANKS, MICRO_BATCHES, ROUNDS = 2, 8, 12
MODEL = ModelConfig(layers=8, dim=256, heads=4, kv_heads=4, ffn_dim=704, vocab_size=512)
BATCH, LENGTH = 2, 256
SCHEDULES = [("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1), ("zb_v", 2)]


class OnlyActivations(nn.Module):
    """A stage as torch's runtime calls it: one tensor in, one out."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, torch.arange(LENGTH).expand(BATCH, LENGTH))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The same for both: torch's runtime takes a loss of what the last stage gives."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).total


def ours(stages: dict[int, Decoder], schedule: Schedule, axis: Axis, tokens: Tensor) -> Callable[[], float]:
    """One step; returns the sum of the losses on the last stage's rank."""
    modules: dict[int, nn.Module] = {stage: OnlyActivations(decoder) for stage, decoder in stages.items()}
    pipeline = Pipeline(modules, schedule, axis, "none", torch.device("cpu"))
    parts = tokens.split(BATCH)

    def step() -> float:
        losses = []

        def forward(stage: int, i: int, x: Tensor | None) -> Tensor:
            y = modules[stage](parts[i] if x is None else x)
            if stage == schedule.stages - 1:
                y = loss_of(y, parts[i])
                losses.append(y.detach())
            return y

        pipeline.forward_backward(forward, lambda: torch.empty(BATCH, LENGTH, MODEL.dim), 1.0)
        return float(sum(losses))

    return step


def torchs(stages: dict[int, Decoder], schedule: Schedule, axis: Axis, tokens: Tensor) -> Callable[[], float]:
    """The same."""
    made = [
        PipelineStage(OnlyActivations(decoder), stage, schedule.stages, torch.device("cpu"), group=axis.group)
        for stage, decoder in stages.items()
    ]
    runtime = _PipelineScheduleRuntime(made, MICRO_BATCHES, loss_fn=loss_of, scale_grads=False)
    runtime._prepare_schedule_with_comms(
        {rank: [_Action.from_str(str(action)) for action in actions] for rank, actions in enumerate(schedule.ranks)}
    )

    def step() -> float:
        losses: list[Tensor] = []
        last = schedule.stages - 1 in stages
        given = (tokens,) if 0 in stages else ()
        runtime.step(*given, target=tokens if last else None, losses=losses if last else None, return_outputs=False)
        return float(sum(loss.detach() for loss in losses))

    return step


def one_rank(rank: int, ranks: int, port: int) -> dict[str, Any]:
    """Schedule -> per runtime seconds of each round, peak bytes, and the losses, which must agree."""
    torch.set_num_threads(1)
    mesh = make_mesh(
        ParallelConfig(pipeline=ranks, shard=1), Workers(rank, ranks, rank, ranks, dist.TCPStore("localhost", port))
    )
    assert mesh.pipeline is not None
    torch.manual_seed(0)
    tokens = torch.randint(MODEL.vocab_size, (BATCH * MICRO_BATCHES, LENGTH))
    found = {}
    for name, chunks in SCHEDULES:
        schedule = make_schedule(name, Shape(ranks, chunks, MICRO_BATCHES))
        per_stage = MODEL.layers // schedule.stages
        steps = {}
        for label, runtime in (("rowwise", ours), ("torch", torchs)):
            torch.manual_seed(1)
            stages = {s: Decoder(MODEL, range(s * per_stage, (s + 1) * per_stage)) for s in range(schedule.stages)}
            mine = {s: stages[s] for s in schedule.stages_of(rank)}
            steps[label] = mine, runtime(mine, schedule, mesh.pipeline, tokens)
        seconds: dict[str, list[float]] = {label: [] for label in steps}
        losses, peaks = {}, {}
        for round_ in range(ROUNDS + 1):
            for label, (stages, step) in steps.items():
                for decoder in stages.values():
                    decoder.zero_grad()
                dist.barrier()
                began = time.perf_counter()
                loss = torch.tensor(step())
                dist.barrier()
                seconds[label].append(time.perf_counter() - began)
                if round_ == 0:
                    dist.all_reduce(loss)
                    losses[label] = float(loss)
        for label, runtime in (("rowwise", ours), ("torch", torchs)):
            stages, _ = steps[label]
            for decoder in stages.values():
                decoder.zero_grad()
            with LiveBytes() as live:  # the buffers that a runtime makes before its first step count too
                runtime(stages, schedule, mesh.pipeline, tokens)()
                peak = torch.tensor(float(live.peak))
            dist.all_reduce(peak, dist.ReduceOp.MAX)
            peaks[label] = int(peak)
        assert abs(losses["torch"] / losses["rowwise"] - 1) < 1e-5, losses
        found[name] = {"seconds": {k: v[1:] for k, v in seconds.items()}, "peak_bytes": peaks}
    dist.destroy_process_group()
    return found


def run(on_ranks: Callable[..., Any]) -> dict[str, Any]:
    """Medians, and the ratio turn by turn."""
    found = on_ranks(one_rank, RANKS)
    rows = {}
    for name, row in found.items():
        ratios = [a / b for a, b in zip(row["seconds"]["rowwise"], row["seconds"]["torch"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        rows[name] = {
            "seconds": {label: median(values) for label, values in row["seconds"].items()},
            "time_ratio": {"median": middle, "quartiles": [low, high]},
            "peak_bytes": row["peak_bytes"],
            "bytes_ratio": row["peak_bytes"]["rowwise"] / row["peak_bytes"]["torch"],
        }
    return {"ranks": RANKS, "micro_batches": MICRO_BATCHES, "rounds": ROUNDS, "schedules": rows}


def show(found: dict[str, Any]) -> str:
    lines = [f"{'schedule':<20}{'seconds':>9}{'torch':>8}{'ratio':>8}{'quartiles':>16}{'bytes / torch':>15}"]
    for name, row in found["schedules"].items():
        low, high = row["time_ratio"]["quartiles"]
        lines.append(
            f"{name:<20}{row['seconds']['rowwise']:>9.3f}{row['seconds']['torch']:>8.3f}"
            f"{row['time_ratio']['median']:>8.3f}{low:>9.3f}-{high:.3f}{row['bytes_ratio']:>14.3f}"
        )
    return "\n".join(lines)
