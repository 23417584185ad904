"""Bytes of states on one rank: measured, and the formula they are held against.

With AdamW in float32, P the bytes of all parameters (4 a parameter), N the ranks that split a state
(shard x ring x ulysses; 1 at stage 0), p_k the bytes of
part k, t_j those of tensor j and uneven rows counted exactly, a rank holds

| stage | between steps | at the peak of a step, beside the optimizer state 2 P/N |
|---|---|---|
| 0 | P + P gradients + 2 P | P, gradients P + max t_j |
| 1 | P/N + 2 P/N | P/N shard + P gathered, gradients P (P/N + max p_k without accumulation) |
| 2 | P/N + 2 P/N | P/N shard + P gathered, gradients P/N + max p_k |
| 3 | P/N + 2 P/N | P/N shard + max p_k gathered, gradients P/N + max p_k |

ZeRO's own count (Rajbhandari et al.) is 4 P, 2 P + 2 P/N, P + 3 P/N, 4 P/N. What is more here: the parameter shard,
which FSDP2 keeps beside the gathered copy (P/N at stages 1 and 2), and the one part in flight, p_k (at stage 0 the one
gradient t_j on its way into its bucket), which the paper does not count. Collectives under way take flat buffers
besides: two parts, and at stage 3 the first and the last too. Where N is 1 every stage is stage 0. In 16-bit precision
the gathered copy, which stage 0 then has too, takes half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rowwise.kernels.rows import local, padded_rows
from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.kernels.torch_dtensor import rows_of
from rowwise.parallel.replicate import buckets_of
from rowwise.parallel.row_file import is_mapped
from rowwise.parallel.shard import sharded_modules
from rowwise.parallel.torch_fsdp import accumulated, flat_buffers, fsdp_group, fsdp_params, gathered

HOST = torch.device("cpu")


@dataclass(frozen=True)
class StateBytes:
    """Bytes that this rank holds. `shards`: its rows of the parameters; `gathered`: whole parameters beside them;
    `gradients`: whole and split ones; `optimizer`: its rows of the states;
    `buffers`: the flat buffers of collectives under way; `host`: what of all that is in the host's memory, of a GPU's run, and
    `file`: what is in files, which are counted there alone."""

    shards: int
    gathered: int
    gradients: int
    optimizer: int
    buffers: int
    host: int = 0
    file: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))


def measure(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device = HOST) -> StateBytes:
    """What the live storages of a run on `device` take now."""
    stay = {
        "shards": _shards(optimizer),
        "optimizer": [t for states in optimizer.state.values() for t in states.values()],
    }
    moving = _Moving(model, _shards(optimizer))
    kinds = stay | moving.tensors()
    # The copy of a tied matrix is in no optimizer, and lies in a file all the same.
    every = [t for p in moving.rows() for t in (p, p.grad) if t is not None]
    every += [t for tensors in kinds.values() for t in tensors]
    return StateBytes(**_bytes_by_kind(kinds, device) | {"file": _bytes_by_kind({"": every}, device)["file"]})


class PeakStates(TorchDispatchMode):
    """While entered, measures after every operation; `peak` is the largest of each kind, `total` of all together."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__()
        self._moving = _Moving(model, _shards(optimizer))
        self._start = self.peak = measure(model, optimizer)
        self._moved: dict[str, int] = {}
        self.total = self.peak.total

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        moved = _bytes_by_kind(self._moving.tensors(), HOST)
        if moved != self._moved:  # few operations make or free any of these
            self._moved = moved
            now = replace(self._start, **moved)  # shards and optimizer states do not move within a step
            self.peak = StateBytes(*map(max, astuple(self.peak), astuple(now)))
            self.total = max(self.total, now.total)
        return result


def _shards(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class _Moving:
    """What of a model moves within a step. Where that is kept is found once, since it is measured after every operation."""

    def __init__(self, model: nn.Module, shards: list[Tensor]):
        modules = list(sharded_modules(model))
        self._shards, self._buckets = shards, buckets_of(model)
        self._modules = {id(fsdp_group(module)): module for module in modules}.values()  # some are gathered as one
        self._inner = [p for module in self._modules for p in fsdp_params(module)]

    def rows(self) -> list[Tensor]:
        """Lists this rank's rows of what FSDP2 holds."""
        return [p.sharded_param for p in self._inner]

    def tensors(self) -> dict[str, list[Tensor]]:
        whole = [p for p in map(gathered, self._inner) if p is not None]
        flat = [] if self._buckets is None else self._buckets.flat
        bucketed = {t.untyped_storage().data_ptr() for t in flat}
        grads = [p.grad for p in [*self._shards, *whole]] + [accumulated(p) for p in self._inner]
        loose = [g for g in grads if g is not None]
        if bucketed:
            loose = [g for g in loose if rows_of(g).untyped_storage().data_ptr() not in bucketed]
        buffers = [buffer for module in self._modules for buffer in flat_buffers(module) if buffer is not None]
        return {"gathered": whole, "gradients": [*flat, *loose], "buffers": buffers}


@dataclass(frozen=True)
class PartBytes:
    """One part of the model: `whole`, this rank's `shard`, `padded` to equal rows on every rank, and its largest
    tensor."""

    whole: int
    shard: int
    padded: int
    tensor: int


def count_parts(parts: list[list[nn.Module]]) -> list[PartBytes]:
    """Counts the parts of a sharded model, in forward order. Each parameter is split over the ranks of its own view."""
    counted = []
    for modules in parts:
        params = [p for module in modules for p in module.parameters()]
        padded = sum(padded_rows(p) * (p.numel() // p.size(0)) * p.itemsize for p in params)
        whole = sum(p.numel() * p.itemsize for p in params)
        largest = max(p.numel() * p.itemsize for p in params)
        counted.append(PartBytes(whole, sum(local(p).numel() * p.itemsize for p in params), padded, largest))
    return counted


def predict(parts: list[PartBytes], zero: int, accumulate: int, states_per_parameter: int = 2) -> StateBytes:
    """The peak of each kind by the formula above, in full precision; `buffers` is a bound."""
    whole, shard = sum(p.whole for p in parts), sum(p.shard for p in parts)
    if shard == whole:
        return StateBytes(whole, 0, whole + max(p.tensor for p in parts), states_per_parameter * whole, 0)
    if zero <= 1 and accumulate > 1:
        gradients = whole
    else:  # with accumulation every shard exists by the last backward; without, those of later parts only
        held = [0 if accumulate == 1 else p.shard for p in parts]
        gradients = max(
            p.whole + sum(held[: k + 1]) + sum(q.shard for q in parts[k + 1 :]) for k, p in enumerate(parts)
        )
    return StateBytes(
        shards=shard,
        gathered=max(p.whole for p in parts) if zero == 3 else whole,
        gradients=gradients,
        optimizer=states_per_parameter * shard,
        buffers=2 * max(p.padded for p in parts) + (parts[0].padded + parts[-1].padded if zero == 3 else 0),
    )


def _bytes_by_kind(kinds: Mapping[str, Sequence[Tensor]], device: torch.device) -> dict[str, int]:
    """The sum over distinct storages of each kind, and of all that lies on the host of a GPU, or in files; a view counts what it
    shows, since a flat buffer is shared by its views."""
    found = dict.fromkeys(kinds, 0) | dict.fromkeys(("host", "file"), 0)
    for kind, tensors in kinds.items():
        seen: dict[tuple[int, int], tuple[str, int]] = {}
        for t in map(rows_of, tensors):  # an operation PeakStates would measure in turn
            storage = t.untyped_storage()
            if storage.size():
                at = storage.data_ptr(), int(t.storage_offset())
                seen[at] = beside(t, device) or kind, t.numel() * t.itemsize
        for where, size in seen.values():
            found[where] += size
    return found


def beside(t: Tensor, device: torch.device) -> Literal["host", "file"] | None:
    """Names where a tensor of a run on `device` lies beside that; None: on it."""
    if t.device.type != "cpu":
        return None
    return "file" if is_mapped(t) else "host" if device.type != "cpu" else None
