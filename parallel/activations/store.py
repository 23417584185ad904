"""What a place must do where results are kept, and what it tells those who watch."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Witness(Protocol):
    """Who watches what a device holds."""

    def note_host(self, tensor: Tensor) -> None:
        """Says that this is what has left the device."""

    def note_return(self, tensor: Tensor) -> None:
        """Says that this is there again."""


class Store(Protocol):
    """Where results are kept. `witness`: whom it tells of what leaves and comes back."""

    witness: Witness | None

    def begin_forward(self) -> None:
        """Says that another forward of the model begins."""

    def begin_block(self) -> None:
        """Says that another block of a forward begins."""

    def put(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """Takes tensors away, and returns what brings them back; they are dropped with that."""

    def close(self) -> None:
        """Ends what works for it."""
