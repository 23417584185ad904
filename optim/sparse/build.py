"""The masks of a run, by the rule that its configuration names."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.spec import Specs
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.sparse.account import Account
from rowwise.optim.sparse.config import NM, ST3, NoSparsity, PDPBase, SparsityConfig, sparse_layers
from rowwise.optim.sparse.layers import find_layers
from rowwise.optim.sparse.set_rigl import SetRigL
from rowwise.optim.sparse.sr_ste import SrSte
from rowwise.optim.sparse.st3_pdp import St3Pdp


class Sparsity(Protocol):
    """How sparse weights are kept so. `account`: of the masks after the last step, where they were counted; `density`:
    the share of all weights of sparse matrices that they keep."""

    @property
    def account(self) -> Account | None: ...

    @property
    def density(self) -> float: ...

    def named_state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint must hold, by parameter and what it is; tensors that stay the same objects."""

    def filter_gradients(self, step: int) -> None:
        """Filters the gradients of step t (counted from 1), after its last backward and before their norm."""

    def step(self, optimizer: Optimizer, step: int, usable: bool) -> None:
        """Makes the optimizer's step t, unless its gradients are not `usable`, and what follows for the masks."""


def build_sparsity(
    model: nn.Module,
    config: SparsityConfig,
    specs: Specs,
    seed: int,
    steps: int,
    stages: dist.ProcessGroup | None,
    compute_dtype: torch.dtype,
) -> Sparsity | None:
    """Builds the masks of the (sharded) parameters of `model`, which is the whole or this rank's stages of a model whose
    parameters are these; None where nothing is sparse. Cuts the initial weights. `stages`: the ranks that hold
    the other stages; `compute_dtype`: of forwards and backwards. All ranks call it."""
    if isinstance(config, NoSparsity):
        return None
    names = sparse_layers(config, specs)
    layers = find_layers(model, names, [specs[name].shape for name in names], stages)
    if isinstance(config, NM):
        return SrSte(config, layers, compute_dtype)
    if isinstance(config, ST3 | PDPBase):
        return St3Pdp(config, layers, steps)
    return SetRigL(config, layers, seed, steps)
