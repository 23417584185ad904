"""What a checkpoint holds of a run, wherever an engine keeps it: the tensors themselves, or made for the purpose."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rowwise.optim.average import Average
from rowwise.optim.build import named_state
from rowwise.optim.sparse.build import Sparsity
from rowwise.parallel.state_bytes import StateBytes, measure
from rowwise.trainer.adapters.allocate import Allocation


def name_of(parameter: str, state: str | None = None) -> str:
    """Returns the name in a checkpoint of a parameter, or of a state that its optimizer keeps."""
    return f"model.{parameter}" if state is None else f"optim.{parameter}.{state}"


def tensors_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsity: Sparsity | None = None,
    average: Average | None = None,
    allocation: Allocation | None = None,
) -> dict[str, Tensor]:
    """Returns every tensor that a checkpoint holds, by its name in it."""
    tensors: dict[str, Tensor] = {name_of(name): p.detach() for name, p in model.named_parameters()}
    for name, states in named_state(model, optimizer).items():
        tensors |= {name_of(name, key): tensor for key, tensor in states.items()}
    if sparsity is not None:
        tensors |= {f"sparsity.{name}": tensor for name, tensor in sparsity.named_state().items()}
    for kept in (average, allocation):
        tensors |= {} if kept is None else kept.named_state()
    return tensors


class States(Protocol):
    """The parameters, optimizer states, masks and averages of a run."""

    def read(self) -> dict[str, Tensor]:
        """Returns them by their names in a checkpoint, each split by rows. All ranks call it."""

    def room(self) -> dict[str, Tensor]:
        """Returns tensors of the same names and layout, for a checkpoint to be read into."""

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from the numbers of `room`, once a checkpoint was read into it. All ranks call it."""

    def held(self) -> StateBytes:
        """Counts the bytes that this rank holds of them now."""


@dataclass(frozen=True)
class LiveStates:
    """Those of a model and an optimizer whose tensors are the rows that a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sparsity: Sparsity | None
    average: Average | None = None
    allocation: Allocation | None = None

    def read(self) -> dict[str, Tensor]:
        return tensors_of(self.model, self.optimizer, self.sparsity, self.average, self.allocation)

    def room(self) -> dict[str, Tensor]:
        return self.read()

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Does nothing: they were read into where they are."""

    def held(self) -> StateBytes:
        return measure(self.model, self.optimizer)
