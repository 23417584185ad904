"""How well a whole model predicts a text: nats per token, perplexity, and bits per byte of the text.

    loss = nats / tokens      perplexity = e^loss      bits per byte = nats of text / (ln 2 x bytes of text)

Bits per byte compare models of different tokenizers (Gao et al., *The Pile*, section 3.1). Tokens that are no text, such as
what ends a document, are in the loss and not in them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rowwise.kernels.products import float32_products
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.loss import mean_loss
from rowwise.trainer.models.ends import Target


@dataclass(frozen=True)
class Measured:
    """Sums over the predicted tokens of a text. `text_bytes`: of how many bytes of text they stand; None: not known."""

    nats: float
    tokens: int
    text_nats: float
    text_bytes: int | None

    @property
    def loss(self) -> float:
        return mean_loss(self.nats, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss > 700 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte; None where the bytes are not known, or there are none."""
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else None


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[MicroBatch], sizes: list[int] | None, tf32: bool) -> Measured:
    """Returns what `model`, whole on one device, gives the labels of `batches`; sums are those of `evaluate`. `sizes`: of each token
    the bytes of text, None where they are not known. Communicates nothing."""
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    bytes_V = None if sizes is None else torch.tensor(sizes, device=device)
    with float32_products("high" if tf32 and device.type == "cuda" else "highest"):
        for batch in batches:
            batch = batch.to(device)
            loss = model(batch.inputs, batch.positions, batch.documents, Target(batch.labels))
            totals += torch.stack([loss.total, loss.tokens, *_of_text(loss.each, batch.labels.flatten(), bytes_V)])
    nats, tokens, marks, text_bytes = totals.tolist()
    return Measured(nats, int(tokens), nats - marks, None if sizes is None else int(text_bytes))


def _of_text(losses_N: Tensor, labels_N: Tensor, bytes_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """(nats of the labels that are no text, bytes of those that are)."""
    if bytes_V is None:
        return losses_N.new_zeros(()), labels_N.new_zeros(())
    valid = labels_N != IGNORE
    bytes_N = bytes_V[labels_N.clamp_min(0)] * valid
    return (losses_N * (valid & (bytes_N == 0))).sum(), bytes_N.sum()
