"""Linear layers with low-rank adapters (Hu et al., *LoRA*).

    y = x W^T + bias + s (x A^T) B^T        W (m, n) frozen, A (r, n), B (m, r); s = alpha / r

Split by rows, each rank has rows of W, A and B; a layer computes with all of them, gathered as every parameter is.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.trainer.adapters.config import Lora
from rowwise.trainer.adapters.frozen import FrozenLinear


class LoraLinear(FrozenLinear):
    """A linear layer with a low-rank adapter beside it. Its weight and bias are those of the layer that it stands in for."""

    def __init__(self, linear: nn.Linear, config: Lora):
        super().__init__(linear)
        self.scale = config.scale
        for name, spec in config.added(linear.weight.shape).items():
            self.register_parameter(name, nn.Parameter(linear.weight.new_empty(spec.shape)))

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input, self.bias) + self.beside(input)

    def beside(self, x: Tensor) -> Tensor:
        """What the adapter adds to that."""
        return F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_a.size(0)}, scale={self.scale:g}"
