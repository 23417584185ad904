"""DeepSpeed as an engine, and the step that it makes: it averages, clips and updates by itself.

It divides the sum of what ranks give it by their number, so each gives as many times its share: the gradient is that of the mean
loss over all valid tokens of the global batch, as everywhere here. These are counted before the forward, since nothing can be
divided when DeepSpeed has clipped.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.optim.flat import FlatOptimizer
from rowwise.parallel.activations.saved import begin_sequences
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.pipeline import Trace
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.loss import added_up, mean_loss, means_by_source, no_totals, summed_loss, totals_of
from rowwise.trainer.step import StepInput, StepReport, told_by_all, valid_tokens


@dataclass(frozen=True)
class DeepSpeedEngine:
    """Runs a model that DeepSpeed's `engine` has split. `optimizer`: the one that DeepSpeed calls on its flat pieces."""

    engine: Any
    optimizer: FlatOptimizer
    device: torch.device

    complete = None

    @property
    def model(self) -> nn.Module:
        return self.engine.module

    def begin(self, batches: list[MicroBatch], trace: Trace | None = None) -> None:
        """Does nothing: each forward is followed by its backward."""

    def forward_backward(self, batches: list[MicroBatch], scale: float | Tensor, trace: Trace | None = None) -> Tensor:
        """Leaves in DeepSpeed what `step` makes an update of. `scale`: of the mean over ranks, which is what it takes."""
        totals = no_totals(batches[0], self.device)
        for number, batch in enumerate(batches, 1):
            begin_sequences(self.model, batch.first)
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            here = batch.to(self.device)
            loss = summed_loss(self.engine, here, scale)
            self.engine.backward(loss.total * scale, scale_wrt_gas=False)
            totals += totals_of(loss, here)
            if number < len(batches):
                self.engine.step()  # counts the micro-batch, no more
        return totals

    def scale_loss_by(self, scale: float) -> None:
        """Sets the loss scale of the next step, which DeepSpeed multiplies by in the backward and divides by in its step."""
        if self.engine.fp16_enabled():
            self.engine.optimizer.loss_scaler.cur_scale = scale

    def step(self) -> float:
        """Clips and updates, unless the norm of the gradients is not finite. Returns that norm, before clipping."""
        self.optimizer.begin_step()
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        finite = not self.engine.optimizer.overflow and norm is not None and math.isfinite(norm)
        if finite:
            return float(norm)
        self.optimizer.take_back_step()
        return math.inf

    def abandon(self) -> None:
        """Does nothing: nothing was begun."""

    @torch.no_grad()
    def losses(self, batches: Iterable[MicroBatch]) -> Tensor:
        here = (batch.to(self.device) for batch in batches)
        return added_up((totals_of(summed_loss(self.engine, batch), batch) for batch in here), self.device)

    @torch.no_grad()
    def logits(self, batch: MicroBatch, place: int | None, refresh: bool) -> Tensor:
        here = batch.to(self.device)
        every = self.engine(here.inputs, here.positions)[0]
        return every[place].double() if place is not None else every.new_zeros(every.size(-1), dtype=torch.float64)

    def release(self) -> None:
        """Does nothing: DeepSpeed frees what it gathered when a layer is over."""


def step_by_deepspeed(
    engine: DeepSpeedEngine, mesh: Mesh, judge: Callable[[StepReport], StepReport], given: StepInput
) -> StepReport:
    """Makes the whole step, up to the update. Beside what DeepSpeed moves, two all-reduces over all ranks, of 1 and of 7 float64. What
    is no number, in the loss or in the gradients, changes no parameter."""
    here = [batch.to(mesh.device) for batch in given.batches]
    tokens = valid_tokens(here, mesh.device)
    dist.all_reduce(tokens)
    engine.scale_loss_by(given.loss_scale)
    seen = engine.forward_backward(here, mesh.world_size / tokens.clamp_min(1).float())
    totals = torch.cat((seen[:2], seen.new_zeros(5), seen[2:]))
    given.status.put(totals[2:7])
    dist.all_reduce(totals)
    (loss_sum, count), told, sums = (part.tolist() for part in totals.cpu().tensor_split((2, 7)))
    by_source = means_by_source(sums)
    report = StepReport(mean_loss(loss_sum, count), math.inf, int(count), **told_by_all(*told), by_source=by_source)
    if not report.sound:
        return judge(report)
    return replace(judge(replace(report, grad_norm=engine.step())), held=False)
