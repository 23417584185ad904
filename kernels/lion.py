"""Lion (Chen et al., *Symbolic Discovery of Optimization Algorithms*) on lists of tensors.

x = x - lr (sign(b1 m + (1 - b1) g) + wd x)          m = b2 m + (1 - b2) g
"""

from typing import Any

from rowwise.kernels import torch_lists


def lion_(params: Any, grads: Any, exp_avgs: Any, lr: float, beta1: float, beta2: float, weight_decay: float) -> None:
    """Takes one Lion step on lists of local tensors, in place."""
    directions = torch_lists.lerp(exp_avgs, grads, 1 - beta1)
    torch_lists.sign_(directions)
    torch_lists.mul_(params, 1 - lr * weight_decay)
    torch_lists.add_(params, directions, alpha=-lr)
    torch_lists.lerp_(exp_avgs, grads, 1 - beta2)
