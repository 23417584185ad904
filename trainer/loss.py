"""The training loss: the cross entropy summed over valid tokens, how many those are, and both by the source of a mixture."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rowwise.kernels.cross_entropy import Loss
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.models.ends import Target


def summed_loss(model: nn.Module, batch: MicroBatch, scale: float | Tensor | None = None) -> Loss:
    """Gives the sum over valid tokens of -log p(label), at least float32, the number of valid tokens, and the loss of each, of this
    rank's micro-batch. `scale`: what the backward that follows will multiply the sum by, where that is known."""
    return model(batch.inputs, batch.positions, batch.documents, Target(batch.labels, scale))


def totals_of(loss: Loss, batch: MicroBatch) -> Tensor:
    """Returns (loss sum, valid tokens) of a micro-batch, and behind them, where its data has K sources, the sums of each, then the
    tokens of each: float64 (2 + 2 K), without a gradient."""
    whole = torch.stack((loss.total.detach(), loss.tokens)).double()
    if batch.sources is None:
        return whole
    each_2B = torch.stack((loss.each.view_as(batch.labels).double().sum(1), (batch.labels != IGNORE).double().sum(1)))
    return torch.cat((whole, (each_2B @ batch.sources.T).flatten()))


def no_totals(batch: MicroBatch, device: torch.device) -> Tensor:
    """Returns the `totals_of` nothing, for micro-batches such as this one."""
    sources = 0 if batch.sources is None else len(batch.sources)
    return torch.zeros(2 + 2 * sources, dtype=torch.float64, device=device)


def added_up(totals: Iterable[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of the `totals_of` several micro-batches; of none, two zeros."""
    every = list(totals)
    return sum(every[1:], every[0]) if every else torch.zeros(2, dtype=torch.float64, device=device)


def mean_loss(loss_sum: float, tokens: float) -> float:
    """Divides a summed loss by the valid tokens it is of; NaN of none."""
    return loss_sum / tokens if tokens else math.nan


def means_by_source(sums: Sequence[float]) -> tuple[float, ...]:
    """Returns the mean loss of each source, of what `totals_of` has of them; NaN of one without a valid token."""
    sources = len(sums) // 2
    return tuple(map(mean_loss, sums[:sources], sums[sources:]))
