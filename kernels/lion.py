"""Lion (Chen et al., *Symbolic Discovery of Optimization Algorithms*) on lists of tensors.

x = x - lr (sign(b1 m + (1 - b1) g) + wd x)          m = b2 m + (1 - b2) g
"""

from typing import Any

from rowwise.kernels import torch_lists
from rowwise.kernels.dispatch import use_numba
from rowwise.kernels.rounding import Rounding


def lion_(
    params: Any,
    grads: Any,
    exp_avgs: Any,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    """Takes one Lion step on lists of local tensors, in place: on the host in one pass over memory, where `use_numba` says so.

    There bfloat16 parameters are computed in float32 with float32 moments and rounded stochastically (`kernels.rounding`);
    gradients are of their dtype or float32.
    """
    if use_numba(params):
        from rowwise.kernels.lion_numba import lion_numba_

        lion_numba_(params, grads, exp_avgs, lr, beta1, beta2, weight_decay, rounding)
    else:
        assert rounding is None
        lion_reference_(params, grads, exp_avgs, lr, beta1, beta2, weight_decay)


def lion_reference_(
    params: Any, grads: Any, exp_avgs: Any, lr: float, beta1: float, beta2: float, weight_decay: float
) -> None:
    """Computes `lion_` of wide parameters in torch's operators on lists."""
    directions = torch_lists.lerp(exp_avgs, grads, 1 - beta1)
    torch_lists.sign_(directions)
    torch_lists.mul_(params, 1 - lr * weight_decay)
    torch_lists.add_(params, directions, alpha=-lr)
    torch_lists.lerp_(exp_avgs, grads, 1 - beta2)
