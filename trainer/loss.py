"""The training loss: the cross entropy summed over valid tokens, and how many those are."""

import math

from torch import Tensor, nn

from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.models.decoder import Target


def summed_loss(model: nn.Module, batch: MicroBatch, scale: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gives (sum over valid tokens of -log p(label), number of valid tokens) of this rank's micro-batch, the sum at least float32.
    `scale`: what the backward that follows will multiply it by, where that is known."""
    loss = model(batch.inputs, batch.positions, batch.documents, Target(batch.labels, scale))
    return loss.total, loss.tokens


def mean_loss(loss_sum: float, tokens: float) -> float:
    """Divides a summed loss by the valid tokens it is of; NaN of none."""
    return loss_sum / tokens if tokens else math.nan
