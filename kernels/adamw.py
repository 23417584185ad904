"""AdamW (Loshchilov & Hutter, *Decoupled Weight Decay Regularization*) on lists of tensors: torch's fused operator.

m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
x = x - lr wd x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rowwise.kernels import torch_lists


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
) -> None:
    """Takes one AdamW step on lists of local tensors, in place, as torch's fused operator: one pass over memory.

    `step` counts from 1.
    """
    if not params:
        return
    steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    torch_lists.fused_adamw_(
        list(params),
        list(grads),
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
