"""The backward in two: input gradients now (I), weight gradients later (W).

    y = x w^T        I: dx = dy w        W: dw = dy^T x

Inside `deferred`, every linear layer of a plain model keeps (x, dy) in its backward instead of computing dw; the rest of
the graph, activations included, is freed as usual. W needs no weights, so under ZeRO-3 they may be gone by then. Biases,
norms and embeddings get their gradients in I: they are cheap. N:M layers (`kernels/nm.py`) multiply by a pruned w in y and
dx, each by its own; W is the same.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rowwise.kernels.nm import nm_input_gradient, nm_linear

# Of every function of (x, weight, bias, ...) that is put off in part: dx from (dy, weight, ...).
_INPUT_GRADIENTS: dict[Any, Callable[..., Tensor]] = {F.linear: torch.matmul, nm_linear: nm_input_gradient}


class WeightGradients:
    """What is left to do for the weights of one stage and one micro-batch. `hold` keeps what W needs of I, and returns what gives
    it."""

    def __init__(self, hold: Callable[[Tensor], Callable[[], Tensor]] = lambda x: lambda: x) -> None:
        self._work: list[Callable[[], None]] = []
        self.hold = hold

    def add(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def run(self) -> None:
        """W: adds each gradient to its parameter's, and frees what it needed as it goes."""
        while self._work:
            self._work.pop()()


class deferred(TorchFunctionMode):
    """While entered, the weight gradients of linear layers go to `later`."""

    entered: ClassVar[list["deferred"]] = []

    def __init__(self, later: WeightGradients):
        super().__init__()
        self.later = later

    def __enter__(self) -> "deferred":
        deferred.entered.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        deferred.entered.pop()
        super().__exit__(*exception)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _INPUT_GRADIENTS and torch.is_grad_enabled():
            return _linear(self.later, function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def is_deferred() -> bool:
    """Whether the forward under way puts off its weight gradients."""
    return bool(deferred.entered)


def in_recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Gives what `torch.utils.checkpoint` enters in a forward, and when it runs that again: there too weight gradients are put
    off, or the graph would be another."""
    return nullcontext(), deferred(deferred.entered[-1].later) if is_deferred() else nullcontext()


def _linear(
    later: WeightGradients, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any
) -> Tensor:
    if not (isinstance(weight, nn.Parameter) and weight.requires_grad):
        return function(input, weight, bias, *how)
    # Detached: autograd must not see a parameter that gets no gradient from it. Where nothing before it learns, it is why dy comes.
    unseen = weight.detach().requires_grad_(not input.requires_grad)
    y = _InputGradient.apply(input, unseen, partial(_keep, later, weight), function, *how)
    return y if bias is None else y + bias


def _keep(later: WeightGradients, weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
    held = later.hold(x.detach())  # which knows how it was made, down to what the stage was given
    later.add(lambda: add_weight_gradient_(weight, held(), dy))


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, keep: Callable[[Tensor, Tensor], None], function: Any, *how: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.keep, ctx.input_gradient, ctx.how = keep, _INPUT_GRADIENTS[function], how
        return function(x, weight, None, *how)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.keep(x, dy)
        dx = ctx.input_gradient(dy, weight, *ctx.how) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *(None for _ in ctx.how)


@torch.no_grad()
def add_weight_gradient_(weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
    """weight.grad += dy^T x, over all but the last dim."""
    left, right = dy.flatten(0, -2).t(), x.flatten(0, -2)
    if weight.grad is None:
        weight.grad = left @ right
    else:
        weight.grad.addmm_(left, right)
