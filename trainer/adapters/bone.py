"""Linear layers with a block of rows beside them (Kang & Yin, *Bone: Block-Affine Adaptation of Large Language Models*; PEFT's MiSS).

    y = x W^T + bias + (sum_j x_j) P        W (m, n) frozen, P (r, m); x_j, r numbers each, are the pieces of x, the last filled with 0

So every r neighbouring columns of W have P^T added to them, the same matrix to all. P begins as 0 and learns at once.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.trainer.adapters.config import Bone
from rowwise.trainer.adapters.frozen import FrozenLinear


class BoneLinear(FrozenLinear):
    """A linear layer with a block beside it. Its weight and bias are those of the layer that it stands in for."""

    bone: nn.Parameter

    def __init__(self, linear: nn.Linear, config: Bone):
        super().__init__(linear)
        for name, spec in config.added(linear.weight.shape).items():
            self.register_parameter(name, nn.Parameter(linear.weight.new_empty(spec.shape)))

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input, self.bias) + folded(input, self.bone.size(0)) @ self.bone

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.bone.size(0)}"


def folded(x: Tensor, rank: int) -> Tensor:
    """Adds up the pieces of x (..., n), `rank` numbers each."""
    filled = F.pad(x, (0, -x.size(-1) % rank)) if x.size(-1) % rank else x
    return filled.unflatten(-1, (-1, rank)).sum(-2)


def unfolded(bone: Tensor, columns: int) -> Tensor:
    """Gives what P (r, m) adds to W: (m, columns)."""
    return bone.t().repeat(1, -(-columns // bone.size(0)))[:, :columns]
