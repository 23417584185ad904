"""The training loss: the cross entropy summed over valid tokens, and how many those are."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE


def summed_loss(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """(sum over valid tokens of -log p(label), number of valid tokens), of this rank's micro-batch.

    At least float32: the sum over a vocabulary is lost in 16 bits.
    """
    return loss_of(model(batch.inputs, batch.positions, batch.documents), batch.labels)


def loss_of(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the loss of logits, as `summed_loss` does."""
    wide = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    loss = F.cross_entropy(wide.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (labels_BS != IGNORE).sum()


def mean_loss(loss_sum: float, tokens: float) -> float:
    """Divides a summed loss by the valid tokens it is of; NaN of none."""
    return loss_sum / tokens if tokens else math.nan
