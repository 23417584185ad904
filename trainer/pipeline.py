"""The stages of one rank, and how micro-batches go through them.

Every rank reads the micro-batches of its replica itself, labels and document masks included; only activations and their
gradients cross stages.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rowwise.kernels.spec import Specs
from rowwise.parallel.activations.config import MemoryConfig
from rowwise.parallel.activations.saved import begin_sequences
from rowwise.parallel.config import ParallelConfig
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank, from_rank_0
from rowwise.parallel.pipeline import Forward, Pipeline, Step, Trace
from rowwise.parallel.pipeline_schedule.order import Schedule, write_csv
from rowwise.parallel.pipeline_schedule.trace import align, write_trace
from rowwise.parallel.shard import begin_step
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.loss import no_totals, totals_of
from rowwise.trainer.measure import measure_parts, read_part_times
from rowwise.trainer.models.config import plain_of
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.ends import Target
from rowwise.trainer.stages import (
    PLAN_KEYS,
    SEQUENCE_KEYS,
    Plan,
    gathering,
    measured_costs,
    plan_pipeline,
    save_plan,
    saved_plan,
    write_costs,
)

T = TypeVar("T")
# The last stage's forward of a micro-batch: to its logits, or to the loss of a target.
Last = Callable[[Target | None], Any]


class StagedDecoder(nn.Module):
    """The stages of one rank, of a model that `schedule` is for. Its parameters have the names they have in the whole model;
    the copy of a tied embedding is none of them, since the first stage owns it."""

    def __init__(self, decoders: dict[int, Decoder], schedule: Schedule):
        super().__init__()
        self._stages = nn.ModuleList(decoders.values())
        self.decoders, self.schedule = decoders, schedule
        self.config = next(iter(decoders.values())).config

    def parameter_specs(self) -> Specs:
        """Gives the spec of every parameter of the whole model."""
        return next(iter(self.decoders.values())).parameter_specs()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for decoder in self.decoders.values():
            for name, p in decoder.named_parameters(*args, **kwargs):
                if p is not decoder.tied_copy:
                    yield name, p


class PipelineStages:
    """Runs this rank's stages of a model, as the schedule says, together with the ranks of the other stages. `dtype`: of what
    crosses a boundary."""

    complete = None  # gradients are summed over ranks once a step

    def __init__(self, model: StagedDecoder, pipeline: Pipeline, dtype: torch.dtype):
        self._model, self.pipeline, self._dtype = model, pipeline, dtype
        self._device = pipeline.device
        self._begun: tuple[Step, Tensor] | None = None

    @property
    def model(self) -> StagedDecoder:
        return self._model

    def begin(self, batches: list[MicroBatch], trace: Trace | None = None) -> None:
        """Makes the first forwards of these micro-batches, as many as need no gradient."""
        here = [batch.to(self._device) for batch in batches]
        totals = no_totals(here[0], self._device)
        for decoder in self._model.decoders.values():
            begin_step(decoder, batches[0].first)

        def loss(last: Last, i: int) -> Tensor:
            found = last(Target(here[i].labels))
            totals.add_(totals_of(found, here[i]))
            return found.total

        step = self.pipeline.begin(self._forward(here, loss), lambda: self._buffer(here[0]), trace)
        self._begun = step, totals

    def forward_backward(self, batches: list[MicroBatch], scale: float | Tensor, trace: Trace | None = None) -> Tensor:
        """Forward and backward of every micro-batch. Returns what `totals_of` says on the last stage, zeros elsewhere;
        every gradient is `scale` times the sum over micro-batches and data-parallel ranks."""
        if self._begun is None:
            self.begin(batches, trace)
        assert self._begun is not None
        (step, totals), self._begun = self._begun, None
        self.pipeline.finish(step, float(scale))
        return totals

    def abandon(self) -> None:
        """Drops what was begun, if anything was; on all ranks alike."""
        if self._begun is not None:
            (step, _), self._begun = self._begun, None
            self.pipeline.abandon(step)

    def losses(self, batches: Iterable[MicroBatch]) -> Tensor:
        """What `totals_of` says on the last stage, zeros elsewhere, without gradients."""
        every = list(batches)
        totals = no_totals(every[0], self._device)
        # In rounds, so that no more is held than in a step.
        size = self.pipeline.schedule.micro_batches
        for begin in range(0, len(every), size):
            here = [batch.to(self._device) for batch in every[begin : begin + size]]

            def loss(last: Last, i: int, here: list[MicroBatch] = here) -> Tensor:
                return totals.add_(totals_of(last(Target(here[i].labels)), here[i]))

            forward = self._forward(here, loss)
            self.pipeline.forward_only(forward, lambda: self._buffer(every[0]), len(here), refresh=begin == 0)
        return totals

    def logits(self, batch: MicroBatch, place: int | None, refresh: bool) -> Tensor:
        """The logits (V) at a place of the first sequence (None: zeros), float64, on every rank of the pipeline."""
        here = batch.to(self._device)
        found = torch.zeros(self._model.config.vocab_size, dtype=torch.float64, device=self._device)

        def keep(last: Last, _: int) -> Tensor:
            logits = last(None)
            return found if place is None else found.copy_(logits[0, place])

        self.pipeline.forward_only(self._forward([here], keep), lambda: self._buffer(here), 1, refresh)
        self.pipeline.broadcast_from_last(found)
        return found

    def release(self) -> None:
        """Does nothing: every pass frees what it gathered."""

    def _forward(self, batches: list[MicroBatch], finish: Callable[[Last, int], Tensor]) -> Forward:
        """What each stage does with each micro-batch; `finish` makes of the last what it is for."""

        def forward(stage: int, i: int, x: Tensor | None) -> Tensor:
            batch, decoder = batches[i], self._model.decoders[stage]
            begin_sequences(decoder, batch.first)
            run = partial(decoder, batch.inputs if x is None else x, batch.positions, batch.documents)
            return run() if decoder.norm is None else finish(run, i)

        return forward

    def _buffer(self, batch: MicroBatch) -> Tensor:
        return torch.empty(*batch.inputs.shape, self._model.config.dim, dtype=self._dtype, device=self._device)


def connect_stages(model: StagedDecoder, parallel: ParallelConfig, dtype: torch.dtype, mesh: Mesh) -> PipelineStages:
    """Connects the stages of this rank, whose parameters must exist, with those of the others; they compute in `dtype`."""
    assert mesh.pipeline is not None
    schedule = model.schedule
    first, last = model.decoders.get(0), model.decoders.get(schedule.stages - 1)
    tied = None
    if model.config.tie_embeddings:
        tied = (first.table if first is not None else None, last.tied_copy if last is not None else None)
    stages: dict[int, nn.Module] = dict(model.decoders)
    pipeline = Pipeline(stages, schedule, mesh.pipeline, gathering(parallel), mesh.device, tied)
    return PipelineStages(model, pipeline, dtype)


def make_plan(run: TrainConfig, mesh: Mesh) -> Plan:
    """The plan of the run; rank 0 makes it for all. What `auto` finds is kept in the run's folder and found there again."""
    config, model, batch, folder = run.parallel, run.model, run.batch, Path(run.run_dir) / "pipeline"
    micro_batches = batch.global_size // batch.micro_size // mesh.data_degree
    about = made_for(run, micro_batches)
    auto = config.pipeline_schedule == "auto"
    stages = config.pipeline * config.virtual_stages
    plan: Plan | None = None
    if auto and mesh.rank == 0:
        plan = saved_plan(about, config.pipeline, stages, micro_batches, folder)
    if auto:
        plan = from_rank_0(plan, mesh.save_group)
    if plan is not None:
        return plan
    times = None
    if auto and config.pipeline_costs is not None:
        times = read_part_times(Path(config.pipeline_costs).expanduser()) if mesh.rank == 0 else None
    elif auto:
        times = measure_parts(run, mesh)
    if mesh.rank == 0:
        plan = plan_pipeline(config, model, batch.seq_len, micro_batches, times)
        if times is not None:
            save_plan(plan, times, about, folder)
    plan = from_rank_0(plan, mesh.save_group)
    assert plan is not None
    return plan


def made_for(run: TrainConfig, micro_batches: int) -> dict[str, Any]:
    """Names what a plan that `auto` finds holds for. What of a run's memory changes how long stages take is named where it is not what
    plans of before that option were made for."""
    plain, memory = MemoryConfig(), run.memory
    keys = ("recompute", "compress", "offload_activations", "fused_loss")
    return {
        "parallel": {key: getattr(run.parallel, key) for key in ("pipeline", "zero", *SEQUENCE_KEYS, *PLAN_KEYS)},
        "model": plain_of(run.model),
        "micro_batches": [micro_batches, run.batch.micro_size, run.batch.seq_len],
        **{key: value for key in keys if (value := getattr(memory, key)) != getattr(plain, key)},
    }


def keep_trace(trace: Trace, folder: Path, mesh: Mesh) -> None:
    """Writes the timeline of a step, as the ranks of the first replica measured it, into `folder`, with what each stage
    took on the mean: `python -m rowwise.launch.schedule run=... to=picture.png` shows both."""
    everyone = of_every_stage(trace.spans(), mesh)
    if mesh.rank == 0:
        timeline = align(everyone)
        folder.mkdir(parents=True, exist_ok=True)
        write_trace(timeline, folder / "trace.json")
        write_csv(timeline.schedule, folder / "schedule.csv")
        write_costs(measured_costs(timeline), folder)


def of_every_stage(mine: T, mesh: Mesh) -> list[T]:
    """What each rank of a pipeline has, in their order, on every rank; of this rank alone where there is none."""
    if mesh.pipeline is None:
        return [mine]
    # Not over `save_group`, on which a save may be under way.
    return from_every_rank(mine, mesh.pipeline.group)
