"""N:M sparsity (`nm`): of every m neighbours in a row the n largest compute, at every step anew.

The weights stay dense and the layers prune them as they compute (`kernels.nm`, `trainer.models.nm`), so nothing here is
sharded but the gradient's one addition, on whole groups of whole rows:

    g = g + decay (1 - mask) w        (Zhou et al., *Learning N:M Fine-Grained Structured Sparse Neural Networks from
                                       Scratch*: weights that are pruned fade, and masks settle)

`decay` is in the unit of a gradient, as in the authors' code, which adds it in the backward: of lr decay w a step under SGD,
which they train with. What a rule does to gradients it does to this too: Adam divides it by sqrt(v), so that it weighs more
where gradients are small (lr decay w / sqrt(v): with gradients of 1e-3, a thousand times lr decay w), and Lion sees it in a
sign. It is a weight decay, lr decay w whatever the gradients are, under no rule but SGD. Unlike theirs it comes after
clipping, for it is no gradient of the loss. Masks are those of the dtype that computes: where it is narrower than
the weights, rounding makes ties.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rowwise.kernels.nm import decay_pruned_, nm_mask
from rowwise.kernels.portions import device_portions
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.sparse.account import Account, begin_account, take_account
from rowwise.optim.sparse.config import NM
from rowwise.optim.sparse.layers import Layers
from rowwise.optim.sparse.masks import pack


@dataclass
class SrSte:
    """The masks of a run as they were when they were last counted; what computes follows the weights."""

    config: NM
    layers: Layers
    compute_dtype: torch.dtype
    account: Account | None = None

    def __post_init__(self) -> None:
        self._find_masks()
        begin_account(self.layers)

    @property
    def density(self) -> float:
        return self.config.n / self.config.m

    def named_state(self) -> dict[str, Tensor]:
        return self.layers.named_masks()

    def filter_gradients(self, step: int) -> None:
        """Leaves gradients as they are, those of dense weights."""

    @torch.no_grad()
    def step(self, optimizer: Optimizer, step: int, usable: bool) -> None:
        """Makes the optimizer's step t, unless its gradients are not `usable`."""
        self.account = None
        if usable:
            n, m, decay = self.config.n, self.config.m, self.config.decay
            for layer in self.layers.mine if decay else []:
                if layer.p.grad is not None:
                    decay_pruned_(layer.gradient(), layer.weight, n, m, decay, self.compute_dtype)
            optimizer.step()
        if step % self.config.account_every == 0:
            self._find_masks()
            self.account = take_account(self.layers)

    @torch.no_grad()
    def _find_masks(self) -> None:
        for layer in self.layers.mine:
            for rows in device_portions(layer.weight, layer.columns):
                weight = layer.weight[rows].to(self.compute_dtype)
                layer.bits[rows] = pack(nm_mask(weight, self.config.n, self.config.m))
