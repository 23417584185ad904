"""The ranks along an axis of the mesh, and messages from one of them to another.

A lane takes the messages of one sender to one receiver, in order and without waiting for others'.

NCCL connects ranks at the first message between them, where the host of each waits for the others: for ever, if one of
those awaits a message meanwhile. So groups are connected, and lanes opened, by a few numbers that go through them in one
order for all ranks, before anything else does.
"""

import datetime
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

Pair = tuple[int, int]  # places on an axis: who sends, who receives


@dataclass(frozen=True)
class Lane:
    """What messages go through: those of one group and tag are in order."""

    group: dist.ProcessGroup
    tag: int


Lanes = Mapping[Pair, Lane]


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis of the mesh that differ from this rank in nothing else (`ranks[i]`: the global rank of the
    i-th), this rank's place among them, the group of all of them, how long it waits, and the lanes that are open."""

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup
    timeout: datetime.timedelta
    lanes: Lanes = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.ranks)


def connects_late(device: torch.device) -> bool:
    """Says whether the ranks of a group connect at their first message: NCCL's do, gloo's when the group is made."""
    return device.type == "cuda"


def connect(
    groups: Iterable[dist.ProcessGroup],
    ring: Axis | None,
    ulysses: Axis | None,
    device: torch.device,
    exchanging: Iterable[dist.ProcessGroup] = (),
) -> None:
    """Lets ranks that connect late do so, as messages will go: sums and gathers in each group and axis, a block round the ring,
    an all-to-all there and in those that are `exchanging`. All ranks must give their groups in one order. A few numbers cross each
    axis."""
    if not connects_late(device):
        return
    for group in [*groups, *(axis.group for axis in (ring, ulysses) if axis is not None)]:
        one = torch.zeros(1, device=device)
        dist.all_reduce(one, group=group)
        dist.all_gather([torch.empty_like(one) for _ in range(group.size())], one, group=group)
    for group in [*([] if ulysses is None else [ulysses.group]), *exchanging]:
        parts = torch.zeros(group.size(), device=device)
        dist.all_to_all_single(torch.empty_like(parts), parts, group=group)
    if ring is not None and ring.size > 1:
        sent, came = torch.zeros(2, 1, device=device)
        after, before = (ring.ranks[(ring.rank + step) % ring.size] for step in (1, -1))
        sides = (dist.isend, sent, after), (dist.irecv, came, before)
        for work in dist.batch_isend_irecv([dist.P2POp(side, x, peer, group=ring.group) for side, x, peer in sides]):
            work.wait()


def neighbours(size: int) -> set[Pair]:
    """Pairs each place with the next, both ways: what the stages of every pipeline send to each other."""
    return {pair for i in range(size - 1) for pair in ((i, i + 1), (i + 1, i))}


def open_lanes(axis: Axis, pairs: set[Pair], device: torch.device) -> Lanes:
    """Opens the lanes of the axis, and one for each of `pairs` that has none yet. All ranks of the axis must call it with
    the same pairs. Where ranks connect late, one number goes through each that is new.

    With gloo the number of a lane is a tag; NCCL knows no tags, and keeps the messages of a group in one queue, so there
    each number is a group of the whole axis.
    """
    numbers = numbered(pairs, {pair: lane.tag for pair, lane in axis.lanes.items()})
    groups = {lane.tag: lane.group for lane in axis.lanes.values()}
    for number in sorted(set(numbers.values()) - groups.keys()):
        groups[number] = axis.group if device.type == "cpu" else _queue_of(axis)
    lanes = {pair: Lane(groups[number], number) for pair, number in numbers.items()}
    for sender, receiver in sorted(lanes.keys() - axis.lanes.keys()) if connects_late(device) else ():
        if axis.rank == sender:
            send_to(receiver, torch.zeros(1, device=device), axis, lanes).wait()
        elif axis.rank == receiver:
            receive_from(sender, torch.zeros(1, device=device), axis, lanes).wait()
    return lanes


def numbered(pairs: set[Pair], taken: Mapping[Pair, int]) -> dict[Pair, int]:
    """Returns `taken`, and a number for each other of `pairs`: the least that no pair has which shares a rank with it."""
    numbers = dict(taken)
    for pair in sorted(pairs - taken.keys()):
        beside = {number for other, number in numbers.items() if set(other) & set(pair)}
        numbers[pair] = next(n for n in itertools.count() if n not in beside)
    return numbers


def _queue_of(axis: Axis) -> dist.ProcessGroup:
    return dist.new_group(list(axis.ranks), timeout=axis.timeout, backend="nccl", use_local_synchronization=True)


def send_to(receiver: int, tensor: Tensor, axis: Axis, lanes: Lanes) -> dist.Work:
    """Starts sending `tensor` to the place `receiver` of the axis."""
    lane = lanes[axis.rank, receiver]
    work = dist.isend(tensor, axis.ranks[receiver], group=lane.group, tag=lane.tag)
    assert work is not None
    return work


def receive_from(sender: int, buffer: Tensor, axis: Axis, lanes: Lanes) -> dist.Work:
    """Starts receiving into `buffer` what the place `sender` sends next."""
    lane = lanes[sender, axis.rank]
    work = dist.irecv(buffer, axis.ranks[sender], group=lane.group, tag=lane.tag)
    assert work is not None
    return work
