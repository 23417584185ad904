"""Messages that a model's own computation needs, apart from those of its states: all-to-all, and a ring."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.parallel.mesh import Axis


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Sends x[i] to the i-th rank of the axis, and returns y, of which y[i] is what the i-th sent. Its gradient goes the same way
    back. All ranks must give the same shape (size, ...).

    Bytes a rank sends: those of x, less the part that it keeps; the same again in the backward.
    """
    return _AllToAll.apply(x, axis)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(y, x.contiguous(), group=axis.group)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(d_y, ctx.axis), None


class Passing:
    """A tensor on its way to the next rank of a ring while that of the rank before comes in; begun when made. `wait` gives
    what came. Neither side waits for the other before that."""

    def __init__(self, tensor: Tensor, ring: Axis):
        self._sent, self._came = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        after, before = (ring.ranks[(ring.rank + step) % ring.size] for step in (1, -1))
        # Together, since NCCL would have every rank of the ring wait for the one before.
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, group=ring.group),
                dist.P2POp(dist.irecv, self._came, before, group=ring.group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._came
