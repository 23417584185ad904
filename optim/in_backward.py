"""The optimizer inside the backward (Lv et al., *LOMO*): each parameter changes as soon as its gradient is complete, and
the gradient is freed, so that never more than a few gradients live at once.

A global gradient norm is known only when no gradient is left to clip, and a second micro-batch would meet changed
parameters: clipping and accumulation are refused.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from rowwise.kernels.rows import local
from rowwise.optim.shell import Optimizer


class InBackward:
    """Hooks on every parameter of `optimizer`, for as long as this lives. `complete` makes a gradient that the backward
    has just left final: it sums it over ranks where nothing else has."""

    def __init__(self, optimizer: Optimizer, complete: Callable[[Tensor], None]):
        self._optimizer, self._complete = optimizer, complete
        self._norms: list[Tensor] = []
        ours = weakref.ref(self)  # a parameter that held its own optimizer would keep it for ever

        def take(p: Tensor) -> None:
            if (optimizer := ours()) is not None:
                optimizer._take(p)

        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(take)

    def begin(self) -> None:
        """Before the backward of a step."""
        self._norms = []
        self._optimizer.begin_step()

    def squared_norm(self) -> Tensor:
        """The sum of squares of all the gradients of this rank that were used, a float64 scalar."""
        return torch.stack(self._norms).square().sum() if self._norms else torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        assert p.grad is not None
        self._complete(p.grad)
        if local(p.grad).numel():
            self._norms.append(torch.linalg.vector_norm(local(p.grad), dtype=torch.float64))
        self._optimizer.step_one(p)
        p.grad = None
