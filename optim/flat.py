"""The optimizer of flat pieces: rules that change every number by itself, on the tensors that DeepSpeed cuts parameters into.

A piece holds numbers of many parameters that follow one rule, and begins and ends anywhere in them. What a rule needs of rows,
matrices or names it cannot have there.
"""

from typing import Any

import torch
from torch import Tensor

from rowwise.optim.adamw import AdamW
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.rule import Batch, Rule, pick


class FlatOptimizer(torch.optim.Optimizer):
    """Makes the step of the rules of `planned`, the optimizer of the whole parameters, on whatever pieces of each of its groups stand
    in their place. `params`: those whose pieces they will be, by name. States are made at the first step of a piece.

    How many updates were made is told by `begin_step`: a step of all may come as many calls of `step`, a piece each.
    """

    def __init__(self, planned: Optimizer, params: dict[str, Tensor]):
        groups: list[dict[str, Any]] = []
        for group in planned.param_groups:
            kept = {key: group[key] for key in ("rule", "weight_decay", "rate")}
            groups.append({"params": [params[name] for name in group["names"]], **kept})
        super().__init__(groups, {"lr": planned.defaults["lr"], "step": 0})
        self._groups = list(self.param_groups)

    def begin_step(self) -> None:
        """Counts an update."""
        for group in self._groups:
            group["step"] += 1

    def take_back_step(self) -> None:
        """Counts an update less: the one that was begun was not made."""
        for group in self._groups:
            group["step"] -= 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the gradients of pieces are DeepSpeed's, which drops them or uses them again."""

    def state_of(self, piece: Tensor, group: int) -> dict[str, Tensor]:
        """Returns the states of a piece of a group, and makes them where there are none."""
        return self._state(piece, self._groups[group]["rule"])

    def _state(self, piece: Tensor, rule: Rule) -> dict[str, Tensor]:
        if not self.state[piece]:
            self.state[piece].update(rule.new_state(piece.detach()))
        return self.state[piece]

    @torch.no_grad()
    def step(self, closure=None):
        """Changes every piece that has a gradient, of those that are in `param_groups` now."""
        assert closure is None
        for group in self.param_groups:
            live = [piece for piece in group["params"] if piece.grad is not None]
            if live:
                group["rule"].step_(self._batch(group, live))

    def _batch(self, group: dict[str, Any], live: list[Tensor]) -> Batch:
        return Batch(
            names=[""] * len(live),
            params=[piece.data for piece in live],
            grads=[piece.grad for piece in live if piece.grad is not None],
            states=[self._state(piece, group["rule"]) for piece in live],
            shapes=[piece.shape for piece in live],
            offsets=[0] * len(live),
            group=None,
            step=group["step"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            seed=0,
        )


class HostAdamW(AdamW):
    """AdamW by DeepSpeed's kernel for processors: all cores, vectors as wide as they have, one pass. The same state as `AdamW`."""

    def __init__(self, betas: list[float], eps: float):
        super().__init__(betas, eps)
        from deepspeed.ops.op_builder import CPUAdamBuilder  # compiled when it is first loaded

        self._kernel, self._number = CPUAdamBuilder().load(), id(self) & 0x7FFFFFFF
        self._kernel.create_adam(self._number, 0.0, *betas, eps, 0.0, True, False)

    def step_(self, batch: Batch) -> None:
        for x, g, m, v in zip(
            batch.params, batch.grads, pick(batch, "exp_avg"), pick(batch, "exp_avg_sq"), strict=True
        ):
            rates = (batch.step, batch.lr, self.beta1, self.beta2, self.eps, batch.weight_decay, True)
            self._kernel.adam_update(self._number, *rates, x, g, m, v)


def on_the_host(rule: Rule) -> Rule:
    """Returns the rule as it is computed where its pieces live in host memory: AdamW by DeepSpeed's kernel, others as they are."""
    return HostAdamW([rule.beta1, rule.beta2], rule.eps) if isinstance(rule, AdamW) else rule
