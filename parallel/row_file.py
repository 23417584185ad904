"""Rows of parameters, gradients and optimizer states in a file of this rank (Rajbhandari et al., *ZeRO-Infinity*).

A tensor that lies in the file is an ordinary tensor, mapped over its pages: whatever reads or writes it is right, through the
system's cache of files. What does so every step goes round that, directly where the file system allows it, in threads:

    fetch       file -> memory of its own          put      memory -> file

The file has no name: the system frees it when the process ends, however it does, so that none is ever torn or left behind; a run
goes on from its checkpoints. Its room is taken when a tensor is laid down, so that a full disk is known then. Communicates nothing.
"""

import bisect
import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowwise.parallel.activations.config import is_folder

BLOCK = 4096  # what direct reads and writes, and the memory they use, are multiples of
PIECE = 4 << 20  # bytes that a thread moves at a time
THREADS = 4  # pieces under way: a disk is fast only with several


class Extent(NamedTuple):
    """Where a tensor is mapped, in bytes: its address, its size, and its place in the file."""

    address: int
    size: int
    place: int


class RowFile:
    """The file of a rank in `folder`, of which `said` tells in errors (`memory.offload_states=/disk`). Raises OSError where it
    cannot be made. `witness`: is told of the memory that is made for what comes and goes, and of gradients that go."""

    def __init__(self, folder: Path, said: str, threads: int = THREADS):
        self._said, self._folder, self._end, self._extents = said, folder, 0, list[Extent]()
        with self._named("cannot be written"):
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self.witness: Callable[[Tensor], None] | None = None
        self._direct = _opened_directly(self._file.fileno())
        self._pool = ThreadPoolExecutor(threads, "rows")

    @property
    def size(self) -> int:
        """Bytes of it that are taken."""
        return self._end

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Makes room for a tensor, and returns it, of zeros. Raises OSError where the disk has none."""
        numbers = torch.Size(shape).numel()
        if not numbers:
            return torch.empty(*shape, dtype=dtype)
        size, place = numbers * dtype.itemsize, self._end
        with self._named("cannot be written"):
            os.posix_fallocate(self._file.fileno(), place, _up(size))
            mapped = _mapped(self._file.fileno(), place, torch.Size(shape), dtype)
        self._end += _up(size)
        bisect.insort(self._extents, Extent(mapped.data_ptr(), size, place))
        return mapped

    def lay(self, t: Tensor) -> Tensor:
        """Copies a tensor into the file, and returns it as it lies there."""
        mapped = self.room(t.shape, t.dtype)
        if t.numel():
            self.put([t.detach().contiguous().cpu()], [mapped]).result()
        return mapped

    def holds(self, t: Tensor) -> bool:
        """Says whether a tensor lies in the file, or is a part of one that does."""
        return self._place(t) is not None

    def fetch(self, there: Sequence[Tensor], memory: Tensor | None = None) -> "Future[list[Tensor]]":
        """Begins to read contiguous tensors that lie in the file, or parts of them, into memory of their own, or into `memory`, which
        has their `span`, aligned: new memory takes the system as long to make as a fast disk takes to fill it."""
        found, pieces = [], []
        for t in there:
            span = self.span([t])
            whole, memory = (self._memory(span), None) if memory is None else (memory[:span], memory[span:])
            here, moves = self._reads(t, whole)
            found.append(here)
            pieces += moves
        return _when_all(pieces, found)

    def span(self, there: Sequence[Tensor]) -> int:
        """Counts the bytes of memory that tensors of the file are read into: those of all blocks of the disk that they touch."""
        spans = ((place := self._placed(t), _up(place + t.nbytes)) for t in there if t.numel())
        return sum(last - place // BLOCK * BLOCK for place, last in spans)

    def put(self, here: Sequence[Tensor], there: Sequence[Tensor]) -> "Future[None]":
        """Begins to write contiguous tensors to where tensors of their shapes lie; what is written must stay as it is until then."""
        pieces = [move for mine, t in zip(here, there, strict=True) for move in self._writes(mine, t)]
        return _when_all(pieces, None)

    def snapshot(self, there: Sequence[Tensor]) -> list[Tensor]:
        """Copies contiguous tensors that lie in the file into another one, and returns them as they lie there: file to file, which
        file systems that can share blocks do without moving any. The copy is freed with its tensors. Raises OSError where the disk
        has no room."""
        with self._named("cannot be written"):
            copy: Any = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        with copy:
            places, end = [], 0
            for t in there:
                places.append(end)
                end += _up(t.nbytes)
            copy.truncate(end)
            moved = [(t, place) for t, place in zip(there, places, strict=True) if t.numel()]
            moves = [
                self._pool.submit(self._copy, self._placed(t), copy.fileno(), place, t.nbytes) for t, place in moved
            ]
            _when_all(moves, None).result()
            return [_mapped(copy.fileno(), place, t.shape, t.dtype) for t, place in zip(there, places, strict=True)]

    def close(self) -> None:
        """Ends its threads, and frees it once no tensor lies in it."""
        self._pool.shutdown()
        os.close(self._direct)
        self._file.close()

    def _place(self, t: Tensor) -> int | None:
        """Where in the file a tensor begins."""
        if not t.numel() or t.device.type != "cpu":
            return None
        address = t.data_ptr()
        n = bisect.bisect_right(self._extents, Extent(address, 1 << 62, 0)) - 1
        if n < 0 or address >= self._extents[n].address + self._extents[n].size:
            return None
        return self._extents[n].place + address - self._extents[n].address

    def _placed(self, t: Tensor) -> int:
        place = self._place(t)
        assert place is not None and t.is_contiguous(), "it does not lie in this file in one piece"
        return place

    def _reads(self, t: Tensor, whole: Tensor) -> tuple[Tensor, list["Future[None]"]]:
        if not t.numel():
            return torch.empty_like(t), []
        place = self._placed(t)
        first, last = place // BLOCK * BLOCK, _up(place + t.nbytes)
        moves = [
            self._pool.submit(self._move, os.preadv, first + at, whole[at : at + PIECE], "cannot be read")
            for at in range(0, last - first, PIECE)
        ]
        return whole[place - first :][: t.nbytes].view(t.dtype).view(t.shape), moves

    def _writes(self, here: Tensor, t: Tensor) -> Iterator["Future[None]"]:
        assert here.is_contiguous() and here.shape == t.shape and here.dtype == t.dtype
        if not t.numel():
            return
        place, data = self._placed(t), here.view(-1).view(torch.uint8)
        if data.data_ptr() % BLOCK != place % BLOCK:
            offset = place % BLOCK
            data = self._memory(offset + here.nbytes)[offset:].copy_(data)
        # The blocks at its ends may be other tensors' too.
        for start, end in _cuts(place, place + here.nbytes):
            part = data[start - place : end - place]
            yield self._pool.submit(self._move, os.pwritev, start, part, "cannot be written")

    def _memory(self, size: int) -> Tensor:
        memory = aligned_memory(size)
        if self.witness is not None:
            self.witness(memory)
        return memory

    def _move(self, call: Callable[[int, Any, int], int], place: int, data: Tensor, what: str) -> None:
        """Reads or writes all of `data`, directly where it is whole blocks."""
        whole = data.numel() % BLOCK == 0 and place % BLOCK == 0
        file, view = self._direct if whole else self._file.fileno(), memoryview(data.numpy())  # type: ignore[arg-type]
        with self._named(what):
            while view:
                done = call(file, [view], place)
                if not done:
                    raise OSError(5, "the file has lost its end")
                view, place = view[done:], place + done
                if done % BLOCK:  # what is left of it begins within a block
                    file = self._file.fileno()

    def _copy(self, place: int, file: int, there: int, size: int) -> None:
        """Copies bytes of the file to another one."""
        with self._named("cannot be copied for a save in the background"):
            while size:
                done = _copy_some(self._file.fileno(), file, size, place, there)
                if not done:
                    raise OSError(5, "the file has lost its end")
                place, there, size = place + done, there + done, size - done

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Says of which option an error is, since files have no name."""
        try:
            yield
        except OSError as error:
            told = f"{self._said} {what} ({error.strerror}); give another folder, or cpu"
            raise OSError(error.errno, told, str(self._folder)) from None


def row_file_of(option: str, where: str) -> RowFile | None:
    """Opens the file of a rank for what waits where an option says; None where that is no folder. Raises OSError."""
    return RowFile(Path(where).expanduser(), f"{option}={where}") if is_folder(where) else None


def is_mapped(t: Tensor) -> bool:
    """Says whether a tensor lies in a file, mapped: its memory is not torch's own."""
    return t.device.type == "cpu" and not t.untyped_storage().resizable()


def aligned_memory(size: int) -> Tensor:
    """Makes room for bytes (uint8) that begin with a block of memory."""
    memory = torch.empty(size + BLOCK, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BLOCK :][:size]


def _copy_some(source: int, target: int, size: int, place: int, there: int) -> int:
    """Copies bytes between files of one file system, which does it by itself where it can; returns how many."""
    try:
        return os.copy_file_range(source, target, size, place, there)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EINVAL):
            raise
        return os.pwrite(target, os.pread(source, min(size, PIECE), place), there)


def _mapped(file: int, place: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(file, shape.numel() * dtype.itemsize, offset=place), dtype=dtype).view(shape)


def _up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _cuts(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cuts bytes of a file into pieces of whole blocks, and what is left at the ends."""
    begin, end = min(_up(first), last), max(last // BLOCK * BLOCK, min(_up(first), last))
    if first < begin:
        yield first, begin
    for start in range(begin, end, PIECE):
        yield start, min(start + PIECE, end)
    if end < last:
        yield end, last


def _opened_directly(file: int) -> int:
    """Opens a file once more, for reads and writes past the system's cache where its file system has them."""
    path = f"/proc/self/fd/{file}"
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDWR)


def _when_all(pieces: "Sequence[Future[None]]", result: Any) -> "Future[Any]":
    """Gives a result once all pieces have been moved; an error where one was not."""
    whole: Future[Any] = Future()
    left = len(pieces)
    if not left:
        whole.set_result(result)
        return whole
    lock, error = threading.Lock(), None

    def take(piece: "Future[None]") -> None:
        nonlocal left, error
        with lock:  # threads of the pool end pieces at the same time
            left, error = left - 1, error or piece.exception()
            last = not left
        if last and error is not None:
            whole.set_exception(error)
        elif last:
            whole.set_result(result)

    for piece in pieces:
        piece.add_done_callback(take)
    return whole
