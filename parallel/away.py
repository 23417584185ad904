"""Rows of parameters and of gradients that wait off the device, in host memory or in files (Rajbhandari et al., *ZeRO-Infinity*), of a
model that FSDP2 gathers block by block (ZeRO stage 3, on one rank too).

    parameters    file -> host -> device -> gathered      a block ahead of use, in the forward and in the backward
    gradients     reduced -> host -> file                 as a block's are there, added to those of micro-batches before

Whatever else reads or writes rows does so through the mapping of their file. Bytes of host memory: rows in memory, all of them; in
files, two blocks of parameters that are read and two of gradients that are written. Messages are FSDP2's.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rowwise.kernels import torch_lists
from rowwise.kernels.portions import row_portions
from rowwise.kernels.rows import local, row_offset
from rowwise.kernels.torch_dtensor import laid_out_as
from rowwise.parallel.device import device_of
from rowwise.parallel.read_ahead import ReadAhead
from rowwise.parallel.row_file import RowFile, aligned_memory
from rowwise.parallel.torch_fsdp import fsdp_params, lay_rows, read_rows_by

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

PORTION = 4 << 20  # numbers of a parameter that are made, or scaled, at a time where they lie in a file
Fill = Callable[[str, Tensor, int, int], None]
_HANDLE = "rows_away"


@dataclass(frozen=True)
class Files:
    """The files of this rank's rows. None: those wait in host memory."""

    params: RowFile | None = None
    gradients: RowFile | None = None


class RowsAway:
    """The rows of the parameters that FSDP2 gathers with each of `modules`, and holds on the meta device: makes room for them in host
    memory, `pinned` for a `device` or not, or in their file. `models` are what `away_of` finds them by."""

    def __init__(
        self,
        models: Iterable[nn.Module],
        modules: "Sequence[FSDPModule]",
        files: Files,
        device: torch.device,
        pinned: bool,
    ):
        self.files = files
        room = files.params.room if files.params is not None else partial(host_room, device, pinned)
        blocks = [[lay_rows(p, room) for p in fsdp_params(module)] for module in modules]
        self._reads: ReadAhead | None = None
        if files.params is not None:
            give_memory_back()
            self._reads = ReadAhead(files.params, blocks)
            for block, module in enumerate(modules):
                read_rows_by(module, partial(self._reads.rows, block))
        self._gradients = None if files.gradients is None else GradientRows(files.gradients, modules)
        for model in models:
            setattr(model, _HANDLE, self)

    @property
    def memory_bytes(self) -> int:
        """Counts the memory that is kept for rows of files to be read into."""
        return 0 if self._reads is None else self._reads.size

    @property
    def spare_bytes(self) -> int:
        """Counts the room in files of gradients that are not there: that of a tied matrix's copy is sent to another stage."""
        return 0 if self._gradients is None else self._gradients.spare_bytes

    @torch.no_grad()
    def fill(self, model: nn.Module, fill_: Fill) -> None:
        """Gives the parameters of `model` their first numbers; see `shard.materialize`."""
        for name, p in model.named_parameters():
            rows, start = local(p), row_offset(p)
            if self.files.params is None or not rows.numel():
                fill_(name, rows, start, p.size(0))
                continue
            for some in row_portions(rows.size(0), rows[0].numel(), PORTION):
                here = memory_like(rows[some])
                fill_(name, here, start + some.start, p.size(0))
                self.files.params.put([here], [rows[some]]).result()

    def begin_pass(self) -> None:
        """Begins a forward, with the backward that follows it: parameters may have changed since the last."""
        if self._reads is not None:
            self._reads.begin()

    def finish_gradients(self) -> None:
        """Leaves in `.grad` what the backwards of a step have left in the file."""
        if self._gradients is not None:
            self._gradients.finish()


class GradientRows:
    """The gradients of what FSDP2 gathers with each of `modules`, in `file`: taken as they are reduced, from hooks of the sharded
    parameters."""

    def __init__(self, file: RowFile, modules: "Sequence[FSDPModule]"):
        self._file = file
        self._there, self._block = dict[Any, Tensor](), dict[Any, int]()
        self._held = set[Any]()  # those of which an earlier micro-batch's are in the file
        self._writing, self._written_for = list[Future[None]](), -1
        for block, module in enumerate(modules):
            for p in (held.sharded_param for held in fsdp_params(module) if held.sharded_param.requires_grad):
                self._there[p], self._block[p] = file.room(local(p).shape, p.dtype), block
                p.register_post_accumulate_grad_hook(self._take)

    @property
    def spare_bytes(self) -> int:
        """Counts the room of gradients that are not there."""
        return sum(there.nbytes for p, there in self._there.items() if p.grad is None)

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        if self._block[p] != self._written_for:
            self._wait()
            self._written_for = self._block[p]
        assert p.grad is not None
        rows, there = local(p.grad), self._there[p]
        if p in self._held:
            rows = self._file.fetch([there]).result()[0].add_(rows)
        self._held.add(p)
        rows = rows.contiguous()
        if self._file.witness is not None:
            self._file.witness(rows)
        self._writing.append(self._file.put([rows], [there]))
        p.grad = None

    def finish(self) -> None:
        """Waits until all are there, and leaves them in `.grad`."""
        self._wait()
        for p in self._held:
            p.grad = laid_out_as(p, self._there[p])
        self._held.clear()

    def _wait(self) -> None:
        writing, self._writing = self._writing, []
        for one in writing:
            one.result()


def away_of(model: nn.Module) -> RowsAway | None:
    """Returns what holds the rows of a model off its device; None where they are on it."""
    return getattr(model, _HANDLE, None)


def give_memory_back() -> None:
    """Has glibc, for as long as the process lives, give the memory of a tensor of a megabyte or more back to the system once it is let
    go of, whatever it was told before (`launch.workers`): kept, it lies in pieces between others, several times what is in use."""
    with contextlib.suppress(OSError, AttributeError):  # another library
        mallopt, trim_threshold, mmap_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -3, -4
        mallopt(mmap_max, 65536)
        mallopt(mmap_threshold, 1 << 20)
        mallopt(trim_threshold, 1 << 20)


def host_room(device: torch.device, pinned: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Makes room for a tensor in host memory."""
    memory = aligned_memory(shape.numel() * dtype.itemsize)
    if pinned:
        device_of(device).pin(memory)
    return memory.view(dtype).view(shape)


def memory_like(t: Tensor) -> Tensor:
    """Makes room in memory for what goes into a file without another copy."""
    return aligned_memory(t.nbytes).view(t.dtype).view(t.shape)


def in_memory(file: RowFile, there: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields tensors of a file, each with a copy in memory, of which the next is read meanwhile."""
    ahead = [file.fetch([t]) for t in there[:1]]
    for t, following in zip(there, [*there[1:], None], strict=True):
        (here,) = ahead.pop().result()
        if following is not None:
            ahead.append(file.fetch([following]))
        yield t, here


def scale_in_file(file: RowFile, tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiplies tensors of a file by each factor in turn, a portion of rows at a time."""
    if not factors:
        return
    parts = [t[some] for t in tensors for some in row_portions(t.size(0), t[0].numel(), PORTION)]
    writing: Future[None] | None = None
    for there, here in in_memory(file, parts):
        for factor in factors:
            torch_lists.mul_([here], factor)  # which rounds as it does a list in memory
        if writing is not None:
            writing.result()
        writing = file.put([here], [there])
    if writing is not None:
        writing.result()
