"""Adam's moments of a projected gradient R (m, r), in 32 or 8 bits."""

from typing import Any

import torch
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.kernels.moment_pair import Moment, dequantise_pair, quantise_pair_
from rowwise.optim.adamw import state_dtype
from rowwise.optim.quantized import is_quantisable, new_moment
from rowwise.optim.rule import rows_like

KEYS = (("exp_avg", True), ("exp_avg_sq", False))  # the first is signed, the second is not


def new_moments(p: Tensor, rank: int, bits: int) -> dict[str, Tensor]:
    """Makes both moments, (m, rank), split like `p`. 8 bits where the logical (m, rank) is large enough for them."""
    if bits == 8 and is_quantisable(torch.Size((p.size(0), rank))):
        return new_moment(p, rank, *KEYS[0]) | new_moment(p, rank, *KEYS[1])
    return {key: rows_like(p, rank, state_dtype(p)) for key, _ in KEYS}


def adam_directions(
    rs: list[Tensor], states: list[dict[str, Tensor]], step: int, beta1: float, beta2: float, eps: float
) -> list[Tensor]:
    """Moves moments towards R and R^2, in place, and makes N = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)."""
    first, second = (list(moment) for moment in zip(*map(read, states, rs), strict=True))
    torch_lists.lerp_(first, rs, 1 - beta1)
    torch_lists.mul_(second, beta2)
    torch_lists.addcmul_(second, rs, rs, value=1 - beta2)
    for state, m, v in zip(states, first, second, strict=True):
        write(state, m, v)
    below = torch_lists.sqrt(second)
    torch_lists.mul_(below, (1 - beta2**step) ** -0.5)
    torch_lists.add_(below, eps)
    directions: Any = torch_lists.div(first, below)
    torch_lists.div_(directions, 1 - beta1**step)
    return list(directions)


def read(state: dict[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Reads both moments in full: the states themselves where they are kept so."""
    if "exp_avg" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    first, second = _codes(state)
    return dequantise_pair(first, second, like.dtype)


def write(state: dict[str, Tensor], m: Tensor, v: Tensor) -> None:
    """Keeps both moments, whether `read` gave them and they changed in place, or they are new."""
    if "exp_avg" not in state:
        first, second = _codes(state)
        quantise_pair_(m, v, first, second)
        return
    for key, value in (("exp_avg", m), ("exp_avg_sq", v)):
        if state[key] is not value:
            state[key].copy_(value)


def _codes(state: dict[str, Tensor]) -> list[Moment]:
    return [(state[f"{key}.codes"], state[f"{key}.absmax"]) for key, _ in KEYS]
