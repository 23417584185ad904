"""AdamW (Loshchilov & Hutter, *Decoupled Weight Decay Regularization*) on lists of tensors: torch's fused operator, or on
bfloat16 parameters a kernel for the host.

m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
x = x - lr wd x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.kernels.dispatch import use_numba
from rowwise.kernels.rounding import Rounding


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    """Takes one AdamW step on lists of local tensors, in place, in one pass over memory.

    `step` counts from 1. bfloat16 parameters, where `use_numba` has a kernel for them, are computed in float32 with float32
    moments and rounded stochastically (`kernels.rounding`); gradients are of their dtype or float32.
    """
    if not params:
        return
    if rounding is not None:
        assert use_numba(params)
        from rowwise.kernels.adamw_numba import adamw_numba_

        adamw_numba_(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, rounding)
        return
    steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    torch_lists.fused_adamw_(
        list(params),
        [g.contiguous() for g in grads],  # on a CPU torch 2.13 reads others in the order of memory
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
