"""What stands between products and a softmax: a scale, and a soft cap (Bello et al., *Neural Combinatorial Optimization with
Reinforcement Learning*; *Gemma 2*).

    z = c tanh(s p / c)        dz / dp = s (1 - (z / c)^2)        without a cap c:  z = s p,  dz / dp = s
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitForm:
    """How logits are made of products: `scale` s, and the soft `cap` c, which no logit exceeds; None: none."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, p: Tensor) -> Tensor:
        """Makes z of p, which stays."""
        p = p if self.scale == 1.0 else p * self.scale
        return p if self.cap is None else (p / self.cap).tanh() * self.cap

    def formed_(self, p: Tensor) -> Tensor:
        """Makes z of p, in place."""
        if self.scale != 1.0:
            p.mul_(self.scale)
        return p if self.cap is None else p.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, z: Tensor) -> Tensor | float:
        """Makes dz / dp of z: a number, or with a cap a tensor like z."""
        if self.cap is None:
            return self.scale
        return (z / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


AS_THEY_ARE = LogitForm()
