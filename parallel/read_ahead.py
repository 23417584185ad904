"""Rows of blocks read from their file a step ahead of use, whichever way a pass goes through the blocks.

Which block comes next is what came next after the same two blocks the time before: forward, backward and from the one to the
other, in a pipeline too, without a word of which that is. What is foretold wrongly is read when it is asked for. Memory: twice the
largest block, kept: one is read while the other is copied. Communicates nothing.
"""

from collections.abc import Sequence
from concurrent.futures import Future

from torch import Tensor

from rowwise.parallel.row_file import RowFile, aligned_memory

Place = int | None  # a block, or None: a pass begins


class ReadAhead:
    """Reads `blocks`, of tensors that lie in `file` each, one ahead of those that are asked for."""

    def __init__(self, file: RowFile, blocks: Sequence[Sequence[Tensor]]):
        self._file, self._blocks = file, blocks
        self._before: tuple[Place, Place] = (None, None)
        self._after: dict[tuple[Place, Place], Place] = {}
        self._under_way: tuple[int, Future[list[Tensor]]] | None = None
        size = max(file.span(block) for block in blocks)
        self._here, self._ahead = aligned_memory(size), aligned_memory(size)

    @property
    def size(self) -> int:
        """Counts the bytes of memory that it keeps."""
        return self._here.nbytes + self._ahead.nbytes

    def begin(self) -> None:
        """Begins a pass: rows may have changed since the one before, so that what was read ahead is of no use."""
        self._come_to(None)
        self._drop()

    def rows(self, block: int) -> list[Tensor]:
        """Gives the rows of a block, in memory that is used again when the next is asked for, and begins to read the block that came
        after it the time before."""
        if self._under_way is None or self._under_way[0] != block:
            self._drop()
            self._read(block)
        assert self._under_way is not None
        rows, self._under_way = self._under_way[1].result(), None
        self._here, self._ahead = self._ahead, self._here
        self._come_to(block)
        if (following := self._after.get(self._before)) is not None:
            self._read(following)
        return rows

    def _read(self, block: int) -> None:
        self._under_way = block, self._file.fetch(self._blocks[block], self._ahead)

    def _drop(self) -> None:
        """Waits for what is being read, into memory that something else is read into next."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way[1].result()

    def _come_to(self, place: Place) -> None:
        self._after[self._before] = place
        self._before = self._before[1], place
