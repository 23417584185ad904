"""What a GPU's messages are like, on gloo: late, and in queues.

    with Wire() as wire:            # on every rank
        run_layout(workers, config)
    wire.log                        # what this rank began and waited for, in its order

A CPU hides two kinds of fault. gloo's results may be there before they are waited for: here every result is NaN (an
integer's largest number) until `wait`, and what was sent must be unchanged then. And gloo buffers and matches messages
by tag: `held_up` goes through the logs of all ranks as NCCL would, whose operations of one group run one after the other,
each waiting for its partners. Messages that C++ begins by itself (DTensor's redistribution) are not seen.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

Queue = tuple[Any, ...]  # what NCCL runs in order: a group, or the lane of a group that a tag stands for


@dataclass(frozen=True)
class Part:
    """One operation: a collective, or one side of a message. `what`: all that its partners must agree on; `partners`:
    global ranks, this one left out."""

    what: tuple[Any, ...]
    partners: tuple[int, ...]


@dataclass(frozen=True)
class Begin:
    """An operation, or several at once, joins its queue."""

    number: int
    queue: Queue
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Wait:
    """All that this rank begins later runs after the operation `number`."""

    number: int


Log = list[Begin | Wait]

# Which arguments of a process group's methods are read, and which are written.
READ_AND_WRITTEN = {"allreduce": ((0,), (0,)), "broadcast": ((0,), (0,)), "reduce": ((0,), (0,))}
_GATHERS = ("_allgather_base", "all_gather_single", "allgather", "gather")
_SCATTERS = ("_reduce_scatter_base", "reduce_scatter_single", "alltoall_base", "all_to_all_single")
READ_AND_WRITTEN |= dict.fromkeys((*_GATHERS, *_SCATTERS), ((1,), (0,)))
READ_AND_WRITTEN |= {"send": ((0,), ()), "recv": ((), (0,)), "barrier": ((), ())}


class Wire:
    """While entered, every message of this thread is late and in `log`."""

    def __init__(self) -> None:
        self.log: Log = []
        self._numbers, self._thread = itertools.count(), threading.get_ident()
        self._batch: list[tuple[int, Queue, Part]] | None = None
        self._patches: list[Any] = []

    def __enter__(self) -> "Wire":
        for name in READ_AND_WRITTEN:
            if (method := getattr(dist.ProcessGroup, name, None)) is not None:
                self._patches.append(mock.patch.object(dist.ProcessGroup, name, self._wrapped(name, method)))
        together = mock.patch.object(dist, "batch_isend_irecv", self._together(dist.batch_isend_irecv))
        for patch in [*self._patches, together]:
            patch.start()
        self._patches.append(together)
        return self

    def __exit__(self, *_: object) -> None:
        while self._patches:
            self._patches.pop().stop()

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        read, written = READ_AND_WRITTEN[name]

        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != self._thread:
                return method(group, *arguments, **options)
            number = next(self._numbers)
            self._began(number, *facts_of(name, group, arguments))
            given = [t for i in read for t in tensors_in(arguments[i])]
            late = [t for i in written for t in tensors_in(arguments[i])]
            hidden = {id(t): t.detach().clone() for t in [*given, *late]}
            there = [replaced(a, hidden) if i in {*read, *written} else a for i, a in enumerate(arguments)]
            work = method(group, *there, **options)
            if work is None:  # done already
                copy_back(late, hidden)
                return None
            # What a gather reads may be a part of what it writes.
            poisoned = {t.untyped_storage().data_ptr() for t in late}
            kept = [(t, hidden[id(t)]) for t in given if t.untyped_storage().data_ptr() not in poisoned]
            for t in late:
                poison_(t)
            return LateWork(work, late, hidden, kept, lambda: self.log.append(Wait(number)))

        return call

    def _began(self, number: int, queue: Queue, part: Part) -> None:
        if self._batch is not None:
            self._batch.append((number, queue, part))
        else:
            self.log.append(Begin(number, queue, (part,)))

    def _together(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(operations: list[dist.P2POp]) -> Any:
            batch = self._batch = []
            works = function(operations)
            self._batch = None
            (queue,) = {queue[:-1] for _, queue, _ in batch}  # a batch goes through the group itself
            number = batch[0][0]
            self.log.append(Begin(number, queue, tuple(part for _, _, part in batch)))
            for work in works:
                work.waited = lambda: self.log.append(Wait(number))
            return works

        return call


class LateWork(dist.Work):
    """An operation under way, whose results are there once it was waited for."""

    def __init__(
        self,
        work: dist.Work,
        late: list[Tensor],
        hidden: dict[int, Tensor],
        kept: list[tuple[Tensor, Tensor]],
        waited: Callable[[], None],
    ):
        super().__init__()
        self._work, self._late, self._hidden, self._kept, self.waited = work, late, hidden, kept, waited

    def wait(self, *timeout: Any) -> bool:
        self._work.wait(*timeout)
        self.waited()
        changed = [tuple(t.shape) for t, before in self._kept if not torch.equal(bits(t), bits(before))]
        assert not changed, f"changed while it was sent: tensors of the shapes {changed}"
        copy_back(self._late, self._hidden)
        self._late, self._kept = [], []
        return True

    def is_completed(self) -> bool:
        return self._work.is_completed()


def facts_of(name: str, group: dist.ProcessGroup, arguments: tuple[Any, ...]) -> tuple[Queue, Part]:
    """The queue of an operation, and what it is."""
    ranks = dist.get_process_group_ranks(group)
    here, queue = dist.get_rank(), (group.group_name, tuple(ranks))
    if name in ("send", "recv"):
        (tensor,), peer, tag = arguments
        way = (here, ranks[peer]) if name == "send" else (ranks[peer], here)
        return (*queue, tag), Part((name, way, tensor.numel(), tensor.dtype), (ranks[peer],))
    sizes = [(t.numel(), t.dtype) for t in tensors_in(arguments[:1] if name in ("allreduce", "broadcast") else [])]
    return queue, Part((name, *sizes), tuple(rank for rank in ranks if rank != here))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for entry in tree:
            yield from tensors_in(entry)


def replaced(tree: Any, by: dict[int, Tensor]) -> Any:
    """The same lists, of other tensors."""
    return by[id(tree)] if isinstance(tree, Tensor) else [replaced(entry, by) for entry in tree]


@torch.no_grad()
def copy_back(late: list[Tensor], hidden: dict[int, Tensor]) -> None:
    for t in late:
        t.detach().copy_(hidden[id(t)])


@torch.no_grad()
def poison_(t: Tensor) -> None:
    """What nobody may read."""
    t.detach().fill_(
        float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
    )


def bits(t: Tensor) -> Tensor:
    """Equal where every bit is."""
    return t.detach().contiguous().view(torch.uint8) if t.ndim else t.detach().view(1).view(torch.uint8)


def held_up(logs: dict[int, Log]) -> list[str]:
    """What ranks would wait for for ever on NCCL, whose operations of one queue run in the order in which they began, each
    once its partners have come to it; what is begun after a wait runs after what was waited for. Empty where all end."""
    ranks = {rank: _Rank(log) for rank, log in logs.items()}
    moved = True
    while moved:
        moved = sum(rank.go_on() for rank in ranks.values()) > 0
        for here, rank in ranks.items():
            for queue in rank.queues:
                moved |= _meet(here, queue, ranks)
    return [f"rank {here} waits in {head.queue} for {[p.what for p in rank.open[head.number]]}"
            for here, rank in ranks.items() for head in rank.heads()]  # fmt: skip


class _Rank:
    """How far a rank has come. `open`: the parts of what is begun and not done."""

    def __init__(self, log: Log):
        self._log, self._at = log, 0
        self.open: dict[int, list[Part]] = {}
        self.queues: dict[Queue, list[Begin]] = {}

    def go_on(self) -> bool:
        """To the first wait for what is not done."""
        before = self._at
        while self._at < len(self._log):
            entry = self._log[self._at]
            if isinstance(entry, Begin):
                self.queues.setdefault(entry.queue, []).append(entry)
                self.open[entry.number] = list(entry.parts)
            elif entry.number in self.open:
                break
            self._at += 1
        return self._at > before

    def head(self, queue: Queue) -> Begin | None:
        """What runs in a queue."""
        return next(iter(self.queues.get(queue, ())), None)

    def heads(self) -> list[Begin]:
        return [queue[0] for queue in self.queues.values() if queue]

    def runs(self, queue: Queue, part: Part) -> bool:
        head = self.head(queue)
        return head is not None and part in self.open[head.number]

    def finish(self, queue: Queue, part: Part) -> None:
        number = self.queues[queue][0].number
        self.open[number].remove(part)
        if not self.open[number]:
            del self.open[number], self.queues[queue][0]


def _meet(here: int, queue: Queue, ranks: dict[int, _Rank]) -> bool:
    """Ends what runs at the head of a queue of rank `here` and its partners run too."""
    head, moved = ranks[here].head(queue), False
    for part in list(ranks[here].open[head.number]) if head is not None else ():
        theirs = {rank: _other_side(part, here, rank) for rank in part.partners}
        if all(ranks[rank].runs(queue, other) for rank, other in theirs.items()):
            ranks[here].finish(queue, part)
            for rank, other in theirs.items():
                ranks[rank].finish(queue, other)
            moved = True
    return moved


def _other_side(part: Part, here: int, there: int) -> Part:
    """The same operation as the partner `there` has it."""
    name, *rest = part.what
    if name in ("send", "recv"):
        return Part(("recv" if name == "send" else "send", *rest), (here,))
    return Part(part.what, tuple(sorted({*part.partners, here} - {there})))
