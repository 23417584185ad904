"""What a parameter is. A model says it of each of its own, in one table by name; whoever needs to know reads it there.

Optimizers read the role and the logical matrix (which rule it follows, in which shape, and whether it decays), initialisation
what it begins as, masks which matrices may be sparse, the mesh which of its views it is laid over, folders of Hugging Face
what it is called in them. A name says nothing of that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from rowwise.kernels.coded_rows import RowForm

Role = Literal["hidden", "embedding", "head", "adapter", "vector"]
DENSE = "dense"  # the view of the mesh that every run has: see `parallel.mesh`


@dataclass(frozen=True)
class Normal:
    """Normal numbers around 0."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Uniform numbers from -bound to bound."""

    bound: float


@dataclass(frozen=True)
class Constant:
    """One number everywhere."""

    value: float


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter. `shape`: logical, of the whole. `role`: a `hidden` matrix, the `embedding`, the `head`, a narrow matrix of an
    `adapter` beside a hidden one, or a `vector`, which is anything whose numbers form no matrix. `init`: what it begins as
    (None: its model never begins at random). `batched`: dim 0 counts, and each entry is a matrix, or a vector, of its own.
    `view`: of the mesh, over which its rows are split and repeated. `theirs`: its name in a folder of Hugging Face (None: there
    it has none), or that of the tensor whose rows from `their_row` on it is, of `their_rows` (None: it is all of it); `copies`:
    names under which the folder may hold it once more. `frozen`: it does not learn, so that it has neither gradient nor state.
    `rate`: its learning rate, as a multiple of the run's. `kept`: in which dtype or as which codes its rows are kept, where that
    is not the run's dtype."""

    shape: torch.Size
    role: Role
    init: Normal | Uniform | Constant | None = None
    batched: bool = False
    view: str = DENSE
    theirs: str | None = None
    copies: tuple[str, ...] = ()
    their_row: int = 0
    their_rows: int | None = None
    frozen: bool = False
    rate: float = 1.0
    kept: RowForm | torch.dtype | None = None

    @property
    def matrix(self) -> torch.Size:
        """The shape of what rules work on: the matrix or vector that the parameter is, or each that it holds."""
        return self.shape[1:] if self.batched else self.shape

    def row_bytes(self, width: int) -> int:
        """Counts the bytes of an entry of dim 0 as it is kept; of `width` bytes a number, where that is in the run's dtype."""
        numbers = self.shape[1:].numel()
        if isinstance(self.kept, RowForm):
            return self.kept.row_bytes(numbers)
        return numbers * (width if self.kept is None else self.kept.itemsize)


Specs = Mapping[str, ParameterSpec]


def learning(specs: Specs) -> Specs:
    """Returns the specs of the parameters that learn."""
    return {name: spec for name, spec in specs.items() if not spec.frozen}


@runtime_checkable
class Specified(Protocol):
    """A model that says what its parameters are."""

    def parameter_specs(self) -> Specs:
        """Gives the spec of every parameter, by name; a part of a model may give those of the whole."""


def specs_of(model: nn.Module) -> Specs:
    """Reads what a model says of its parameters. Raises ValueError for one that says nothing."""
    if not isinstance(model, Specified):
        raise ValueError(
            f"{type(model).__name__} does not say what its parameters are; give it a method parameter_specs(), which returns a "
            "kernels.spec.ParameterSpec for each name"
        )
    return model.parameter_specs()
