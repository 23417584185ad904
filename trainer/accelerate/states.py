"""What a checkpoint holds of a run on DeepSpeed: rows of whole parameters, as of any other run, made from its flat pieces and back.

A parameter is put together on every rank, of which each keeps its rows: one parameter, and one of its states, at a time. So a run
that began on DeepSpeed goes on without it, on any layout, and back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowwise.kernels.rows import local, tensors
from rowwise.kernels.torch_dtensor import laid_out_as
from rowwise.optim.flat import FlatOptimizer
from rowwise.parallel.accelerate import deepspeed_zero
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.state_bytes import StateBytes
from rowwise.trainer.states import name_of

Fill = Callable[[str, Tensor, int, int], None]


@dataclass(frozen=True)
class DeepSpeedStates:
    """The states of a run whose `engine` is DeepSpeed's. `keys`: what `optimizer` keeps of each parameter, by name."""

    engine: Any
    optimizer: FlatOptimizer
    keys: dict[str, list[str]]
    mesh: Mesh

    def read(self) -> dict[str, Tensor]:
        """Returns every tensor of a checkpoint, of which this rank has its rows in host memory. All ranks call it. Crosses all ranks:
        every parameter and every state of it, in 32 bits."""
        found = {}
        for name, key, whole in deepspeed_zero.read(self.engine, self.optimizer):
            start, size = self._mine(whole.size(0))
            found[name_of(name, key)] = self._laid_out(whole[start : start + size].cpu(), whole.shape)
        return found

    def room(self) -> dict[str, Tensor]:
        found = {}
        for name, p in self.engine.module.named_parameters():
            shape = deepspeed_zero.shape_of(p)
            for key in (None, *self.keys[name]):
                rows = torch.empty((self._mine(shape[0])[1], *shape[1:]))
                found[name_of(name, key)] = self._laid_out(rows, shape)
        return found

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from the tensors of a checkpoint. All ranks call it; what crosses them is as in `read`."""
        deepspeed_zero.write(self.engine, self.optimizer, lambda name, key: self._whole(tensors[name_of(name, key)]))

    def fill(self, fill_: Fill) -> None:
        """Gives the masters what a run begins with, in 32 bits, where the model that DeepSpeed made them of may have been rounded."""
        shapes = {name: deepspeed_zero.shape_of(p) for name, p in self.engine.module.named_parameters()}

        def whole(name: str, key: str | None) -> Tensor:
            numbers = torch.zeros(shapes[name], device=self.mesh.device)
            if key is None:
                fill_(name, numbers, 0, shapes[name][0])
            return numbers

        deepspeed_zero.write(self.engine, self.optimizer, whole)

    def held(self) -> StateBytes:
        """Counts the bytes in memory, the device's and the host's, as far as DeepSpeed shows them: `gathered` are the parameters that
        compute, `shards` their masters."""
        parameters, masters, states = deepspeed_zero.held(self.engine, self.optimizer.state)
        return StateBytes(shards=masters, gathered=parameters, gradients=0, optimizer=states, buffers=0)

    def _mine(self, rows: int) -> tuple[int, int]:
        """The first of this rank's rows, and how many they are: split as FSDP2 splits them."""
        most = -(-rows // self.mesh.world_size)
        start = min(rows, most * self.mesh.rank)
        return start, min(most, rows - start)

    def _laid_out(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """A tensor of this `shape` of which these rows are this rank's; they stay on the host."""
        if self.mesh.world_size == 1:
            return rows
        like = torch.empty((), device=self.mesh.device).expand(rows.shape)
        return laid_out_as(self._split(like, shape), rows)

    def _whole(self, rows: Tensor) -> Tensor:
        """All rows of a tensor, on every rank's device."""
        here = local(rows).to(self.mesh.device)
        if self.mesh.world_size == 1:
            return here
        whole: Any = self._split(here, rows.shape)
        return whole.full_tensor()

    def _split(self, rows: Tensor, shape: torch.Size) -> Any:
        stride = tuple(torch.Size(shape[dim + 1 :]).numel() for dim in range(len(shape)))
        axis, split = self.mesh.states["shard"], [tensors.Shard(0)]
        return tensors.DTensor.from_local(rows, axis, split, run_check=False, shape=shape, stride=stride)
