"""Rows of blocks read from their file a step ahead of use, whichever way a pass goes through the blocks.

Which block comes next is what came next after the same two blocks the time before: forward, backward and from the one to the
other, in a pipeline too, without a word of which that is. What is foretold wrongly is read when it is asked for. Memory: the block
that is asked for, until it is copied, and the one after it. Communicates nothing.
"""

from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor

from rowwise.parallel.row_file import RowFile

Place = int | None  # a block, or None: a pass begins


class ReadAhead:
    """Reads `blocks`, of tensors that lie in `file` each, one ahead of those that are asked for."""

    def __init__(self, file: RowFile, blocks: Sequence[Sequence[Tensor]]):
        self._file, self._blocks = file, blocks
        self._before: tuple[Place, Place] = (None, None)
        self._after: dict[tuple[Place, Place], Place] = {}
        self._under_way: tuple[int, Future[list[Tensor]]] | None = None

    def begin(self) -> None:
        """Begins a pass: rows may have changed since the one before, so that what was read ahead is of no use."""
        self._come_to(None)
        self._under_way = None

    def rows(self, block: int) -> list[Tensor]:
        """Gives the rows of a block, in memory of their own, and begins to read what came after it the time before."""
        foretold, self._under_way = self._under_way, None
        reading = (
            foretold[1] if foretold is not None and foretold[0] == block else self._file.fetch(self._blocks[block])
        )
        self._come_to(block)
        if (following := self._after.get(self._before)) is not None:
            self._under_way = following, self._file.fetch(self._blocks[following])
        return reading.result()

    def _come_to(self, place: Place) -> None:
        self._after[self._before] = place
        self._before = self._before[1], place
