"""Kept results on the host or in files while the forward goes on, and back ahead of the backward.

    forward      device -> host (-> file)      a block's results leave while the next one is computed
    backward     (file ->) host -> device      those of the block before come while one is differentiated, and of the one before
                                               that from its file

(Rajbhandari et al., *ZeRO-Infinity*: offloaded activations; Liao et al., *Fuyou*: on to files.) What leaves is what comes back,
bit for bit. On a GPU copies have streams of their own, and the device holds results of at most two blocks that are still
leaving and of two that are there again. The host holds all of them, pinned (`cpu`), or of at most two blocks on their way to a
file and two on their way back (a path). On the CPU, which has no other memory, `cpu` copies and saves nothing; a path does.

Files have no name: the system frees them when they are let go of, and when the process ends, however it does. Bytes a rank
moves: those of what its blocks keep, once out and once back. Communicates nothing.
"""

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rowwise.kernels.torch_storage import require_unwritten, written
from rowwise.parallel.activations.store import Witness
from rowwise.parallel.device import Copies, Device, Mark, device_of

LEAVING = 2  # blocks whose results may be on their way out
AHEAD = (
    2  # blocks before the one that is differentiated whose results come from files; those of the nearest to the device
)

Laid = Callable[[], "Future[Sequence[Tensor]]"]  # asks for tensors that were laid down


class Shelf(Protocol):
    """Where results wait, once they are in host memory."""

    def begin_forward(self) -> None:
        """Says that another forward of the model begins."""

    def begin_block(self) -> None:
        """Says that another block begins. Waits until few enough are under way."""

    def lay(self, here: Sequence[Tensor], copied: Sequence[Mark]) -> Laid:
        """Takes host tensors, which are whole once the marks are reached."""

    def close(self) -> None:
        """Ends what works for it."""


class Memory:
    """Host memory itself."""

    def begin_forward(self) -> None: ...

    def begin_block(self) -> None: ...

    def lay(self, here: Sequence[Tensor], copied: Sequence[Mark]) -> Laid:
        ready: Future[Sequence[Tensor]] = Future()
        ready.set_result(here)
        return lambda: ready

    def close(self) -> None: ...


class Folder:
    """Files in a folder, one for each forward of the model, without a name. Raises OSError where they cannot be written."""

    def __init__(self, path: Path, device: Device):
        self._path, self._pinned = path, device.pins
        # A thread begins on GPU 0, and what it waits for or pins would make a context there.
        self._writer, self._reader = (
            ThreadPoolExecutor(1, f"activations-{verb}", device.own_stream) for verb in ("out", "back")
        )
        self._file: Any = None
        self._end = 0
        self._under_way: deque[list[Future[None]]] = deque()

    def begin_forward(self) -> None:
        self._file = None

    def begin_block(self) -> None:
        self._under_way.append([])
        while len(self._under_way) > LEAVING:
            for wrote in self._under_way.popleft():
                wrote.result()

    def lay(self, here: Sequence[Tensor], copied: Sequence[Mark]) -> Laid:
        if self._file is None:
            with self._named("cannot be written"):
                self._file, self._end = tempfile.TemporaryFile(dir=self._path, buffering=0), 0  # noqa: SIM115
        file, start, forms = self._file, self._end, [(t.shape, t.dtype) for t in here]
        self._end += sum(t.nbytes for t in here)
        written = self._writer.submit(self._write, file, start, list(here), copied)
        self._under_way[-1].append(written)
        return lambda: self._reader.submit(self._read, file, start, forms, written)

    def close(self) -> None:
        self._file = None
        for pool in (self._writer, self._reader):
            pool.shutdown()

    def _write(self, file: Any, place: int, here: list[Tensor], copied: Sequence[Mark]) -> None:
        for mark in copied:
            mark.synchronize()
        with self._named("cannot be written"):
            while here:
                place = _write_all(file.fileno(), place, _bytes_of(here.pop(0)))

    def _read(
        self, file: Any, place: int, forms: Sequence[tuple[torch.Size, torch.dtype]], written: "Future[None]"
    ) -> Sequence[Tensor]:
        written.result()
        found = [torch.empty(shape, dtype=dtype, pin_memory=self._pinned) for shape, dtype in forms]
        with self._named("cannot be read"):
            for t in found:
                place = _read_all(file.fileno(), place, _bytes_of(t))
        return found

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Says of which folder an error is, since files have no name."""
        try:
            yield
        except OSError as error:
            said = f"memory.offload_activations={self._path} {what} ({error.strerror}); give another folder, or cpu"
            raise OSError(error.errno, said, str(self._path)) from None


def _bytes_of(t: Tensor) -> memoryview:
    return memoryview(t.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_all(file: int, place: int, data: memoryview) -> int:
    """Writes `data` at `place`, and returns where it ends."""
    while data:
        done = os.pwrite(file, data, place)
        data, place = data[done:], place + done
    return place


def _read_all(file: int, place: int, data: memoryview) -> int:
    while data:
        done = os.preadv(file, [data], place)
        assert done, "a file of activations has lost its end"
        data, place = data[done:], place + done
    return place


class Parcel:
    """Results that left together. On the device until they have left, and again from when they come back to when they are read."""

    def __init__(
        self, block: "Block", copies: Copies, shelf: Shelf, tensors: Sequence[Tensor], witness: Witness | None
    ):
        self._block, self._copies = block, copies
        left = [copies.away(t) for t in tensors]
        self._witness = witness
        if witness is not None:
            for here, _ in left:
                witness.note_host(here)
        self._laid = shelf.lay([here for here, _ in left], [mark for _, mark in left])
        self._still: Sequence[Tensor] | None = tensors
        self._marks, self._written = [mark for _, mark in left], [written(t) for t in tensors]
        self._loading: Future[Sequence[Tensor]] | None = None
        self._coming: list[tuple[Tensor, Mark]] | None = None

    def leave(self) -> None:
        """Lets go of what is on the device: what is computed from now on waits until it has left."""
        if self._still is not None:
            for t, mark in zip(self._here(), self._marks, strict=True):
                self._copies.join(t, mark)
        self._still = None

    def load(self) -> None:
        """Begins to bring it into host memory."""
        if self._loading is None and self._still is None:
            self._loading = self._laid()

    def come(self) -> None:
        """Begins to bring it to the device."""
        self.load()
        if self._coming is None and self._loading is not None:
            self._coming = [self._copies.back(t) for t in self._loading.result()]
            self._loading = None
            if self._witness is not None:
                for t, _ in self._coming:
                    self._witness.note_return(t)

    def read(self) -> Sequence[Tensor]:
        self._block.approach()
        if self._still is not None:
            return self._here()
        self.come()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        for t, mark in coming:
            self._copies.join(t, mark)
        return [t for t, _ in coming]

    def _here(self) -> Sequence[Tensor]:
        """What has not left yet."""
        assert self._still is not None
        return [require_unwritten(t, times) for t, times in zip(self._still, self._written, strict=True)]


@dataclass(eq=False)
class Block:
    """What a forward of a block has sent away, and the block before it. Who keeps a result keeps its parcel."""

    before: "Block | None"
    parcels: "list[weakref.ref[Parcel]]" = field(default_factory=list)
    _approached: bool = False

    def live(self) -> list[Parcel]:
        return [parcel for ref in self.parcels if (parcel := ref()) is not None]

    def approach(self) -> None:
        """Says that the backward has come here: what it needs next sets out."""
        if self._approached:
            return
        self._approached = True
        block = self.before
        for distance in range(AHEAD):
            for parcel in block.live() if block is not None else ():
                if distance:
                    parcel.load()
                else:
                    parcel.come()
            block = block.before if block is not None else None
        self.before = None


class Offload:
    """A store (`store.Store`) on the host or in files."""

    def __init__(self, copies: Copies, shelf: Shelf):
        self._copies, self._shelf = copies, shelf
        self.witness: Witness | None = None
        self._block: Block | None = None
        self._leaving: deque[Block] = deque()

    def begin_forward(self) -> None:
        self._block = None
        self._shelf.begin_forward()

    def begin_block(self) -> None:
        self._block = Block(self._block)
        self._shelf.begin_block()
        self._leaving.append(self._block)
        while len(self._leaving) > LEAVING:
            for parcel in self._leaving.popleft().live():
                parcel.leave()

    def put(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        assert self._block is not None
        parcel = Parcel(self._block, self._copies, self._shelf, tensors, self.witness)
        self._block.parcels.append(weakref.ref(parcel))
        return parcel.read

    def close(self) -> None:
        self._shelf.close()


def store_on(device: torch.device, where: str) -> Offload:
    """Opens the store of results of `device`: `cpu`, host memory, or the path of a folder."""
    does = device_of(device)
    return Offload(does.copies(), Memory() if where == "cpu" else Folder(Path(where).expanduser(), does))
