"""Numbers of at least 32 bits: what sums and exponentials are taken in."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns `dtype`, or float32 where it has fewer bits."""
    return torch.promote_types(dtype, torch.float32)


def wide(t: Tensor) -> Tensor:
    """Returns `t` in `wide_dtype`: itself where it has the bits."""
    return t.to(wide_dtype(t.dtype))
