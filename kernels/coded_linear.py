"""A linear layer of a weight that does not change and is kept in fewer bits than it multiplies with.

    y = x W^T        dx = dy W        W: the numbers behind what is kept

Kept for the backward is what is kept of W anyway, not W: it is decoded where it multiplies, once forward and once backward, and gone
afterwards. A matrix of R x C takes 2 R C bytes of bfloat16 for as long as it multiplies.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rowwise.kernels.coded_rows import RowForm, decode_rows
from rowwise.kernels.torch_compiler import left_to_python


def stored_weight(kept: Tensor, columns: int, form: RowForm | None, dtype: torch.dtype) -> Tensor:
    """Gives W (R, C) in `dtype` of what is kept of it: rows of bytes, or with no form W itself, in another dtype. Communicates
    nothing."""
    return kept.to(dtype) if form is None else decode_rows(kept, columns, form, dtype)


@left_to_python
def coded_linear(x: Tensor, kept: Tensor, form: RowForm | None, bias: Tensor | None = None) -> Tensor:
    """Multiplies x (..., C) by W, to (..., R), and adds the bias (R,). No gradient goes to W. Communicates nothing."""
    if form is None and kept.dtype == x.dtype:
        return F.linear(x, kept, bias)
    y = _CodedLinear.apply(x, kept, form)
    return y if bias is None else y + bias


class _CodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, form: RowForm | None) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.form, ctx.columns = form, x.size(-1)
        return F.linear(x, stored_weight(kept, x.size(-1), form, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return dy @ stored_weight(kept, ctx.columns, ctx.form, dy.dtype), None, None
