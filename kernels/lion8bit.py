"""Lion with its moment in 8 bits: 1.02 bytes of state per parameter instead of 4.

Chen et al., *Symbolic Discovery of Optimization Algorithms*; Chen et al., *Lion Secretly Solves Constrained
Optimization*. Per element, with the moment dequantised before and quantised again after (`blockwise`, signed):

    x = x - lr (sign(b1 m + (1 - b1) g) + wd x)          m = b2 m + (1 - b2) g

The Triton and numba forms read and write every operand once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rowwise.kernels.dispatch import use_numba, use_triton
from rowwise.kernels.lion import lion_reference_
from rowwise.kernels.moment_pair import Moment
from rowwise.kernels.moments import ONE, Rounding, check_step, step_reference_


def lion8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    """Takes one step on lists of local tensors (m_i, n_i), contiguous, in place; m_i may be 0. Communicates nothing.

    params: all float32, all float64 or all bfloat16; grads: of that dtype or float32. A moment is (codes, absmax) as
    `blockwise.quantise` makes them, zeros at first. bfloat16 parameters are computed in float32 and rounded
    stochastically (`rounding`): rounding[i] = (key, logical index of the first element) of parameter i.
    """
    check_step(params, grads, (exp_avgs,), rounding)
    if not params or params[0].dtype == torch.float64:
        lion8bit_reference_(params, grads, exp_avgs, lr, beta1, beta2, weight_decay, rounding)
    elif use_triton(params[0].device):
        from rowwise.kernels.lion8bit_triton import lion8bit_triton_

        lion8bit_triton_(params, grads, exp_avgs, lr, beta1, beta2, weight_decay, rounding)
    elif use_numba(params):
        from rowwise.kernels.lion8bit_numba import lion8bit_numba_

        lion8bit_numba_(params, grads, exp_avgs, lr, beta1, beta2, weight_decay, rounding)
    else:
        lion8bit_reference_(params, grads, exp_avgs, lr, beta1, beta2, weight_decay, rounding)


def lion8bit_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    rounding: Rounding = None,
) -> None:
    """Computes `lion8bit_` in plain torch."""

    def rule(x, g, exp_avg):
        lion_reference_(x, g, exp_avg, lr, beta1, beta2, weight_decay)

    step_reference_(params, grads, (exp_avgs,), ONE, rounding, rule)
