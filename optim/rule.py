"""What a rule is: how one kind of parameter changes. The optimizer hands it the local rows of many parameters at once.

A rule is written on whole rows of the *logical* matrix, so it is the same on every layout; where it needs a number of
the whole matrix, it sums over `Batch.group`, the shard axis, in one message for all the parameters of a batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.kernels.philox import stream_key
from rowwise.kernels.portions import row_portions
from rowwise.kernels.rows import local, tensors
from rowwise.kernels.torch_dtensor import split_as


@dataclass(frozen=True)
class Batch:
    """What a rule sees of one step: lists, an entry a parameter. `params`, `grads` and `states` are this rank's rows;
    `shapes` are logical; `offsets` is the logical row of the first. `step` counts from 1."""

    names: list[str]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    shapes: list[torch.Size]
    offsets: list[int]
    group: dist.ProcessGroup | None
    step: int
    lr: float
    weight_decay: float
    seed: int

    def rounding(self) -> list[tuple[int, int]]:
        """Returns, for stochastic rounding, the key of each parameter's stream at this step, and the logical index of its first
        element."""
        keys = [stream_key(self.seed, f"rounding/{name}/{self.step}") for name in self.names]
        return [(key, o * row_length(shape)) for key, o, shape in zip(keys, self.offsets, self.shapes, strict=True)]

    def rounding_if_narrow(self) -> list[tuple[int, int]] | None:
        """Returns `rounding` of 16-bit parameters, which a rule that rounds needs; None where they are wider."""
        return self.rounding() if self.params and self.params[0].dtype == torch.bfloat16 else None


class Rule(Protocol):
    """One rule of change. `fused`: it needs no memory beside its operands and is given all parameters at once, the
    others a portion at a time. `rounds`: it writes 16-bit parameters itself, `rounds_on_host`: where `kernels.dispatch.use_numba` has
    a kernel for it; else it is given float32 copies of them.
    `by_rows`: its step on some rows of a matrix is their part of its step on all, and multiplies no matrices.
    `shared`: ranks share its matrices out, so a portion has at least one for each. `weightwise`: the states that hold a
    number for each weight, and what zero is there."""

    name: str
    fused: bool
    rounds: bool
    rounds_on_host: bool
    by_rows: bool
    shared: bool
    weightwise: ClassVar[dict[str, int]]

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        """Makes the state of a parameter before its first step: tensors only, laid like it wherever they have its rows."""

    def step_(self, batch: Batch) -> None:
        """Changes `params` and `states` in place."""


def row_length(shape: Sequence[int]) -> int:
    """Counts the numbers in one row (entry of dim 0)."""
    return int(torch.Size(shape[1:]).numel())


def rows_like(p: Tensor, columns: int | None, dtype: torch.dtype) -> Tensor:
    """Makes zeros with the rows of `p` and `columns` columns (None: a vector of one number a row), split as `p` is."""
    tail = () if columns is None else (columns,)
    return laid_like(p, torch.zeros(local(p).size(0), *tail, dtype=dtype, device=p.device))


def zeros_of(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes zeros of the shape of `p`, split as `p` is; by rows, for DTensor learns an operation anew for every shape."""
    return laid_like(p, torch.zeros_like(local(p), dtype=dtype))


def each_of(p: Tensor, one: Tensor) -> Tensor:
    """Makes copies of `one`, one for each entry of dim 0 of `p`, split as `p` is."""
    return laid_like(p, one.expand(local(p).size(0), *one.shape).contiguous())


def laid_like(p: Tensor, rows: Tensor) -> Tensor:
    """This rank's rows of a tensor that is split as `p` is."""
    if not isinstance(p, tensors.DTensor):
        return rows
    tail = rows.shape[1:]
    stride = tuple(torch.Size(tail[dim:]).numel() for dim in range(len(tail) + 1))
    shape = torch.Size((p.size(0), *tail))
    return split_as(p, rows, shape, stride)


def shard_group(p: Tensor) -> dist.ProcessGroup | None:
    """Returns the ranks that hold the other rows of `p`; None where this one has them all."""
    if not isinstance(p, tensors.DTensor):
        return None
    groups = [
        p.device_mesh.get_group(dim) for dim, place in enumerate(p.placements) if isinstance(place, tensors.Shard)
    ]
    assert len(groups) <= 1, "rows are split over one axis"
    return groups[0] if groups and groups[0].size() > 1 else None


def all_reduce_(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sums each tensor over the ranks of `group`, in place, all in one message."""
    if group is None or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    torch_lists.copy_([t.view(-1) for t in tensors], list(flat.split([t.numel() for t in tensors])))


def apply_(batch: Batch, updates: list[Tensor]) -> None:
    """Applies an update in place: x = x - lr wd x - lr u."""
    if batch.weight_decay:
        torch_lists.mul_(batch.params, 1 - batch.lr * batch.weight_decay)
    torch_lists.add_(batch.params, updates, alpha=-batch.lr)


def row_slices(t: Tensor) -> Iterable[slice]:
    """Returns the rows of `t` in portions that a rule can go through without leaving a core's cache; on a GPU, where launches
    cost more, all at once."""
    return [slice(None)] if t.device.type == "cuda" else row_portions(t.size(0), row_length(t.shape))


def pick(batch: Batch, key: str) -> list[Tensor]:
    """Returns the state `key` of every parameter."""
    return [state[key] for state in batch.states]
