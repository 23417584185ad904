"""Engines: how a model runs forward and backward on this rank. The step, evaluation, sampling and saving know no other thing of
a layout.

An engine has no optimizer and no data. What makes the weights change is chosen in `trainer.update`, by engine: one that owns
its step as well gives an `Update` of its own there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.parallel.activations.saved import begin_sequences, begin_without_backward
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.replicate import gradient_sum
from rowwise.parallel.shard import begin_micro_batch, begin_pass, begin_step, finish_backward, release_gathered
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.loss import added_up, no_totals, summed_loss, totals_of


class Engine(Protocol):
    """What runs a model on this rank. Micro-batches may be on the host."""

    @property
    def model(self) -> nn.Module:
        """Its parameters, as far as this rank holds them, by the names that they have in the whole model."""

    @property
    def complete(self) -> Callable[[Tensor], None] | None:
        """Makes one gradient final as the backward leaves it; None where gradients are final only once
        `forward_backward` is over."""

    def begin(self, batches: list[MicroBatch], trace: Trace | None = None) -> None:
        """Begins the next step as far as that touches no gradient and nothing that the step before may still undo;
        `forward_backward` of the same micro-batches goes on from there."""

    def forward_backward(self, batches: list[MicroBatch], scale: float | Tensor, trace: Trace | None = None) -> Tensor:
        """Leaves in every gradient `scale` times the sum over micro-batches and data-parallel ranks. Returns what this rank
        saw of (loss sum, valid tokens), float64, and of those of each source (see `loss.totals_of`); summed over all ranks they
        are those of the global batch."""

    def abandon(self) -> None:
        """Drops what was begun, if anything was; on all ranks alike."""

    def losses(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Returns what this rank saw of (loss sum, valid tokens), and of those of each source, and leaves no gradient."""

    def logits(self, batch: MicroBatch, place: int | None, refresh: bool) -> Tensor:
        """Returns the logits (V) at a place of the first sequence (None: zeros), float64, on every rank that holds a part of
        the model. `refresh`: weights have changed since the last pass."""

    def release(self) -> None:
        """Frees what passes without a backward left gathered: the model's parameters are this rank's rows again."""


@dataclass(frozen=True)
class WholeModel:
    """Runs a whole model: of which this rank holds all (`parallel.replicate`) or its rows (`parallel.shard`). `replicas`: the
    ranks that hold the same rows."""

    model: nn.Module
    device: torch.device
    zero: int
    replicas: dist.ProcessGroup

    @property
    def complete(self) -> Callable[[Tensor], None]:
        return gradient_sum(self.model, self.replicas)

    def begin(self, batches: list[MicroBatch], trace: Trace | None = None) -> None:
        """Does nothing: each forward is followed by its backward."""

    def forward_backward(self, batches: list[MicroBatch], scale: float | Tensor, trace: Trace | None = None) -> Tensor:
        totals = no_totals(batches[0], self.device)
        begin_pass(self.model)
        begin_step(self.model, batches[0].first)
        for number, batch in enumerate(batches, 1):
            begin_micro_batch(self.model, self.zero, last=number == len(batches))
            begin_sequences(self.model, batch.first)
            here = batch.to(self.device)
            loss = summed_loss(self.model, here, scale)
            (loss.total * scale).backward()
            totals += totals_of(loss, here)
        finish_backward(self.model)
        return totals

    def abandon(self) -> None:
        """Does nothing: nothing was begun."""

    @torch.no_grad()
    def losses(self, batches: Iterable[MicroBatch]) -> Tensor:
        begin_pass(self.model)
        begin_without_backward()
        here = (batch.to(self.device) for batch in batches)
        totals = added_up((totals_of(summed_loss(self.model, batch), batch) for batch in here), self.device)
        self.release()
        return totals

    @torch.no_grad()
    def logits(self, batch: MicroBatch, place: int | None, refresh: bool) -> Tensor:
        here = batch.to(self.device)
        begin_pass(self.model)
        begin_without_backward()
        every = self.model(here.inputs, here.positions)[0]
        return every[place].double() if place is not None else every.new_zeros(every.size(-1), dtype=torch.float64)

    def release(self) -> None:
        release_gathered(self.model)
