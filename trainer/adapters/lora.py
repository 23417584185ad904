"""Linear layers with low-rank adapters: LoRA (Hu et al.), AdaLoRA (Zhang et al.) and DoRA (Liu et al.).

    LoRA       y = x W^T + bias + s (d A^T) B^T                          W (m, n) frozen, A (r, n), B (m, r); s = alpha / r
    AdaLoRA    y = x W^T + bias + s (d A^T diag(E)) B^T                  E (r,)
    DoRA       y = x W^T + bias + (g - 1) d W^T + g s (d A^T) B^T        g = size / norm(W + s B A), a number a row

d is x, or what dropout leaves of it. With d = x, DoRA is the layer of W + s B A whose rows have the sizes that learn. Its norms
are constants to the gradient (section 4.3 of its paper, and PEFT), and are found without the matrix:

    norm^2 = sum W^2 + 2 s sum (W A^T) B + s^2 sum (B A A^T) B        sums along rows

Split by rows, each rank has rows of W, A, B and of the sizes; a layer computes with all of them, gathered as every parameter is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rowwise.kernels.wide import wide_dtype
from rowwise.trainer.adapters.config import LowRankBase
from rowwise.trainer.adapters.dropout import Dropout
from rowwise.trainer.adapters.frozen import FrozenLinear


class LoraLinear(FrozenLinear):
    """A linear layer with a low-rank adapter beside it. Its weight and bias are those of the layer that it stands in for."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    dropout: Dropout | None = None

    def __init__(self, linear: nn.Linear, config: LowRankBase):
        super().__init__(linear)
        self.scale = config.scale
        for name, spec in config.added(linear.weight.shape).items():
            self.register_parameter(name, nn.Parameter(linear.weight.new_empty(spec.shape)))

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input, self.bias) + self.beside(self.dropped(input))

    def beside(self, x: Tensor) -> Tensor:
        """What the low-rank matrices give."""
        return F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    def dropped(self, x: Tensor) -> Tensor:
        """What dropout leaves."""
        return x if self.dropout is None else self.dropout(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_a.size(0)}, scale={self.scale:g}"


class AdaLoraLinear(LoraLinear):
    """A LoRA layer with a number for each of its triplets."""

    lora_e: nn.Parameter

    def beside(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_a) * self.lora_e.flatten(), self.lora_b) * self.scale


class DoraLinear(LoraLinear):
    """A LoRA layer of whose rows the sizes learn by themselves."""

    magnitude: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        sizes = row_norms(self.matrix(input.dtype), self.lora_a, self.lora_b, self.scale)
        g = (self.magnitude.to(sizes.dtype) / sizes).to(input.dtype)
        d, base = self.dropped(input), self.base(input)
        y = g * (base + self.beside(d)) if d is input else base + (g - 1) * self.base(d) + g * self.beside(d)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns the 2-norms of the rows of w + scale b a, in 32 bits or more; see above."""
    wide = wide_dtype(w.dtype)
    own = torch.linalg.vector_norm(w, dim=1, dtype=wide).square()
    b_wide, gram = b.to(wide), (a @ a.t()).to(wide)
    crossed = ((w @ a.t()).to(wide) * b_wide).sum(1)
    added = (b_wide @ gram * b_wide).sum(1)
    squares = own + 2 * scale * crossed + scale**2 * added
    return squares.clamp(min=torch.finfo(wide).tiny).sqrt()
