"""AdamW with both moments in 8 bits: 2.03 bytes of state per parameter instead of 8.

Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, on the rule of Loshchilov & Hutter, *Decoupled Weight
Decay Regularization*. Per element, with the moments dequantised before and quantised again after (`moment_pair`):

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    x = x - lr wd x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

x moves by the fresh m and v, before they are rounded to codes. The first moment has the signed code book, the second
the unsigned one, and their rounding never makes a later step larger. The Triton and numba forms read and write every operand once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rowwise.kernels.adamw import adamw_
from rowwise.kernels.dispatch import use_numba, use_triton
from rowwise.kernels.moment_pair import Moment
from rowwise.kernels.moments import PAIR, Rounding, check_step, step_reference_


def adamw8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    """Takes one step on lists of local tensors (m_i, n_i), contiguous, in place; m_i may be 0. Communicates nothing.

    params: all float32, all float64 or all bfloat16; grads: of that dtype or float32. A moment is (codes, absmax) as
    `blockwise.quantise` makes them, zeros at first. `step` counts from 1. bfloat16 parameters are computed in float32
    and rounded stochastically (`rounding`): rounding[i] = (key, logical index of the first element) of parameter i.
    """
    check_step(params, grads, (exp_avgs, exp_avg_sqs), rounding)
    hyper = (step, lr, beta1, beta2, eps, weight_decay)
    if not params or params[0].dtype == torch.float64:
        adamw8bit_reference_(params, grads, exp_avgs, exp_avg_sqs, *hyper, rounding)
    elif use_triton(params[0].device):
        from rowwise.kernels.adamw8bit_triton import adamw8bit_triton_

        adamw8bit_triton_(params, grads, exp_avgs, exp_avg_sqs, *hyper, rounding)
    elif use_numba(params):
        from rowwise.kernels.adamw8bit_numba import adamw8bit_numba_

        adamw8bit_numba_(params, grads, exp_avgs, exp_avg_sqs, *hyper, rounding)
    else:
        adamw8bit_reference_(params, grads, exp_avgs, exp_avg_sqs, *hyper, rounding)


def adamw8bit_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    """Computes `adamw8bit_` in plain torch: on each portion of rows torch's fused operator, one pass for the whole rule."""

    def rule(x, g, exp_avg, exp_avg_sq):
        adamw_(x, g, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay)

    step_reference_(params, grads, (exp_avgs, exp_avg_sqs), PAIR, rounding, rule)
