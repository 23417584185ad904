"""Ranks that are not there, to which a step that is made on the meta device sends its messages."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class OnPaper:
    """Stands for the process group of an axis: torch's collectives hand it the buffers that would be sent, and it tells `note` of
    each. Sends nothing."""

    def __init__(self, rank: int, size: int, note: Callable[[Tensor], None]):
        self._rank, self._size, self._note = rank, size, note

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> None:
        for t in tensors:
            self._note(t)

    reduce = broadcast = allreduce

    def all_to_all_single(self, into: Tensor, given: Tensor, *sizes_and_options: Any) -> None:
        self._note(into)
        self._note(given)

    alltoall_base = all_to_all_single  # its name before torch 2.13
