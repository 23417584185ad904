"""How AdaLoRA shares ranks among matrices (Zhang et al., *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*):
functions of tensors and numbers alone.

    I = |w g|        avg <- b1 avg + (1 - b1) I        unc <- b2 unc + (1 - b2) |I - avg|        s(w) = avg unc

    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)        of triplet i of a matrix

Of all triplets of all matrices those with the largest S keep their E_i, as many as the budget of the step says; the others' are 0
until they are let in again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """From `start` triplets to `end`: none go in the first `warm_up` steps, in the last `settle` they stay as they are, and between,
    every `every` steps, as many go as the cube of what is left of the way says."""

    start: int
    end: int
    warm_up: int
    settle: int
    every: int
    steps: int

    def at(self, step: int) -> tuple[int, bool]:
        """Says how many triplets there are after a step (counted from 0, as the authors count), and whether any are chosen then."""
        if step <= self.warm_up:
            return self.start, False
        if step > self.steps - self.settle:
            return self.end, True
        left = 1 - (step - self.warm_up) / (self.steps - self.settle - self.warm_up)
        return int(self.end + (self.start - self.end) * left**3), step % self.every == 0

    def learns(self, step: int) -> bool:
        """Says whether importance is still moved at a step: not once what is chosen stays."""
        return step < self.steps - self.settle


def move_importance_(
    avg: list[Tensor], unc: list[Tensor], params: list[Tensor], grads: list[Tensor], b1: float, b2: float
) -> None:
    """Moves the two averages of each tensor, by its numbers and their gradients, in place."""
    for a, u, p, g in zip(avg, unc, params, grads, strict=True):
        now = (p * g).abs_().to(a.dtype)
        a.mul_(b1).add_(now, alpha=1 - b1)
        u.mul_(b2).add_(now.sub_(a).abs_(), alpha=1 - b2)


def kept(scores: Tensor, budget: int) -> Tensor:
    """Says of each triplet whether it is among the `budget` of largest score; of equal ones at the edge all go, as the authors'."""
    gone = scores.numel() - budget
    if gone <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.flatten().kthvalue(gone).values
