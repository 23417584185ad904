"""What stands before the layers of a model and behind them: embeddings, heads, and what a head gives a loss of.

Shapes: B sequences, S tokens, D model dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.cross_entropy import Loss, cross_entropy, linear_cross_entropy
from rowwise.kernels.logit_form import AS_THEY_ARE, LogitForm
from rowwise.kernels.wide import wide, wide_dtype
from rowwise.trainer.models.config import ModelConfig


def scaled(x_BSD: Tensor, scale: float) -> Tensor:
    """Multiplies embeddings by a number that is rounded to their dtype first, as Gemma does."""
    return x_BSD if scale == 1 else x_BSD * torch.full((), scale, dtype=x_BSD.dtype, device=x_BSD.device)


class StableEmbedding(nn.Embedding):
    """An embedding with a layer norm after it, so that rare and frequent tokens come alike into the model and their
    gradients vary less (Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, section 2.3).

    y = weight (e - mean(e)) / sqrt(var(e) + 1e-5) + bias, in float32 or wider, given in the embedding's own dtype. A head
    that is tied to it multiplies by the matrix alone.
    """

    def __init__(self, vocab_size: int, dim: int, _weight: Tensor | None = None):
        super().__init__(vocab_size, dim, _weight=_weight)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        e_BSD = super().forward(x)
        wide = wide_dtype(e_BSD.dtype)
        scale, shift = self.norm.weight.to(wide), self.norm.bias.to(wide)
        return F.layer_norm(e_BSD.to(wide), self.norm.normalized_shape, scale, shift, self.norm.eps).to(e_BSD.dtype)


@dataclass(frozen=True)
class Target:
    """What a model is to predict: `labels` (B, S), negative where there is none; `scale`: what its loss will be multiplied by in the
    backward, where that is known."""

    labels: Tensor
    scale: float | Tensor | None = None


class Head(nn.Linear):
    """Logits of `form`, or their loss; `fused`: that of the logits without the logits (`kernels.cross_entropy`)."""

    def __init__(self, dim: int, vocab_size: int, fused: bool = True, form: LogitForm = AS_THEY_ARE):
        super().__init__(dim, vocab_size, bias=False)
        self.fused, self.form = fused, form

    def forward(self, x: Tensor, target: Target | None = None) -> Tensor | Loss:  # type: ignore[override]
        return apply_head(x, self.weight, target, self.fused, self.form)


def apply_head(
    x_BSD: Tensor, w_VD: Tensor, target: Target | None, fused: bool, form: LogitForm = AS_THEY_ARE
) -> Tensor | Loss:
    """Gives the logits (B, S, V), or with a target the loss of them."""
    if target is None:
        products = F.linear(x_BSD, w_VD)
        return products if form == AS_THEY_ARE else form.of(wide(products)).to(products.dtype)
    x_ND, labels_N = x_BSD.flatten(0, 1), target.labels.flatten()
    if fused:
        return linear_cross_entropy(x_ND, w_VD, labels_N, target.scale, form)
    return cross_entropy(F.linear(x_ND, w_VD), labels_N, form)


def loss_of_head(head: nn.Module, x_BSD: Tensor, target: Target | None) -> Tensor | Loss:
    """Gives the logits (B, S, V) that a head makes, or with a target the loss of them."""
    if isinstance(head, Head):
        result: Tensor | Loss = head(x_BSD, target)
        return result
    logits_BSV: Tensor = head(x_BSD)
    return logits_BSV if target is None else cross_entropy(logits_BSV.flatten(0, 1), target.labels.flatten())


def initial_table(config: ModelConfig) -> Tensor:
    """What torch's embedding begins with. On the meta device it would import the compiler for that, which takes a second."""
    weight = torch.empty(config.vocab_size, config.dim)
    return weight if weight.is_meta else nn.init.normal_(weight)
