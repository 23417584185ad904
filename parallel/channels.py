"""Messages between the stages of a pipeline: first sent, first received, and a send never waits."""

from collections import deque
from collections.abc import Callable, Collection

import torch.distributed as dist
from torch import Tensor

from rowwise.parallel.lanes import Axis, Lanes, receive_from, send_to
from rowwise.parallel.pipeline_schedule.order import Action, Key, Schedule


class Channels:
    """The messages of one pass over `schedule`, as this rank sends and receives them.

    On a lane messages arrive in the order in which they are sent; that order follows from the schedule, so a message is
    only its numbers. `buffer()` makes room for one. Between two stages of this rank nothing is sent: a tensor is handed
    over.
    """

    def __init__(
        self,
        schedule: Schedule,
        axis: Axis,
        lanes: Lanes,
        buffer: Callable[[], Tensor],
    ):
        self._schedule, self._axis, self._lanes, self._buffer = schedule, axis, lanes, buffer
        self._expected: dict[int, deque[Key]] = {}
        for sender, receiver, key in schedule.messages:
            if receiver == axis.rank and sender != axis.rank:
                self._expected.setdefault(sender, deque()).append(key)
        self._coming: dict[Key, tuple[dist.Work, Tensor]] = {}
        self._here: dict[Key, Tensor] = {}
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, key: Key, tensor: Tensor) -> None:
        """Sends `tensor` to the rank of the stage that takes it. The tensor is kept until it is gone."""
        receiver = self._schedule.rank_of[key[1]]
        if receiver == self._axis.rank:
            self._here[key] = tensor
            return
        self._leaving.append((send_to(receiver, tensor.contiguous(), self._axis, self._lanes), tensor))

    def expect(self, key: Key) -> None:
        """Makes room for the message `key`, and for those that come before it, so that they can arrive."""
        forward, stage, _ = key
        sender = self._schedule.rank_of[stage - 1 if forward else stage + 1]
        while sender != self._axis.rank and key not in self._coming:
            buffer, coming = self._buffer(), self._expected[sender].popleft()
            self._coming[coming] = receive_from(sender, buffer, self._axis, self._lanes), buffer

    def free(self) -> None:
        """Lets go of what is sent and gone. (gloo does not say so before the end, and keeps what was sent until then.)"""
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()

    def receive(self, key: Key) -> Tensor:
        """Returns the message `key`, once it has arrived."""
        if key in self._here:
            return self._here.pop(key)
        self.expect(key)
        work, buffer = self._coming.pop(key)
        work.wait()
        return buffer

    def drain(self, forwards: Collection[Action]) -> None:
        """Takes what was sent to this rank and nobody took, where nothing but `forwards` was done, on all ranks."""
        sent = {(True, stage + 1, i) for stage, _, i in forwards}
        for key in [key for queue in self._expected.values() for key in queue if key in sent]:
            self.expect(key)
        for work, _ in self._coming.values():
            work.wait()
        self._coming.clear()
        self._here.clear()
        self.close()

    def close(self) -> None:
        """Returns when everything sent is gone."""
        while self._leaving:
            self._leaving.popleft()[0].wait()
