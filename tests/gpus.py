"""GPUs whose time is counted, not spent: threads stand for ranks, and each has a clock of its own.

    network = Network(4)
    network.run(work_of_rank)           # a thread a rank; raises where all wait for ever
    network.spend(1.5)                  # what this rank computes takes so long

A message arrives when it is sent, and who takes it goes on from there. `synchronize` waits for the whole device, as CUDA's
does: for every receive that this rank has posted. An event is a place in the current stream: all that this rank computed.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Stuck(RuntimeError):
    """Every rank waits for another."""


class Network:
    def __init__(self, size: int):
        self.clocks = [0.0] * size
        self._here = threading.local()
        self._changed = threading.Condition()
        self._waiting: list[Callable[[], bool]] = []
        self._left, self._stuck = size, False
        self._sent: dict[tuple[int, int], deque[tuple[Tensor, float]]] = defaultdict(deque)
        self._posted: dict[int, list[Receive]] = defaultdict(list)

    def run(self, work: Callable[[int], None]) -> None:
        """Runs `work(rank)` on every rank. Raises what a rank raised."""
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self._here.rank = rank
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)
            with self._changed:
                self._left -= 1
                self._changed.notify_all()

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(self.clocks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    @property
    def rank(self) -> int:
        return self._here.rank

    def spend(self, seconds: float) -> None:
        self.clocks[self.rank] += seconds

    def wait_until(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._waiting.append(ready)
            while not ready():
                everyone = len(self._waiting) == self._left
                self._stuck |= everyone and not any(other() for other in self._waiting)
                if self._stuck:
                    self._changed.notify_all()
                    raise Stuck("every rank waits for another")
                self._changed.wait()
            self._waiting.remove(ready)

    def send_to(self, receiver: int, tensor: Tensor, *_: Any) -> "Sent":
        with self._changed:
            self._sent[self.rank, receiver].append((tensor.detach().clone(), self.clocks[self.rank]))
            self._changed.notify_all()
        return Sent()

    def receive_from(self, sender: int, buffer: Tensor, *_: Any) -> "Receive":
        before = [r for r in self._posted[self.rank] if r.sender == sender]
        self._posted[self.rank].append(Receive(self, sender, buffer, len(before)))
        return self._posted[self.rank][-1]

    def synchronize(self, device: Any = None) -> None:
        """Waits for the whole device."""
        posted = list(self._posted[self.rank])
        self.wait_until(lambda: all(receive.arrived() for receive in posted))

    def event(self, **_: Any) -> "Event":
        return Event(self)

    def message(self, sender: int, number: int, receiver: int) -> tuple[Tensor, float] | None:
        queue = self._sent[sender, receiver]
        return queue[number] if number < len(queue) else None


class Sent:
    def wait(self) -> None: ...

    def is_completed(self) -> bool:
        return True


class Receive:
    """The `number`-th message from `sender`."""

    def __init__(self, network: Network, sender: int, buffer: Tensor, number: int):
        self.sender = sender
        self._network, self._buffer, self._number, self._rank = network, buffer, number, network.rank

    def _message(self) -> tuple[Tensor, float] | None:
        return self._network.message(self.sender, self._number, self._rank)

    def arrived(self) -> bool:
        return self._message() is not None

    def wait(self) -> None:
        self._network.wait_until(self.arrived)
        message = self._message()
        assert message is not None
        self._buffer.copy_(message[0])
        self._network.clocks[self._rank] = max(self._network.clocks[self._rank], message[1])


class Event:
    """A place in the current stream of a rank."""

    def __init__(self, network: Network):
        self._network, self.seconds = network, 0.0

    def record(self) -> None:
        self.seconds = self._network.clocks[self._network.rank]

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.seconds - self.seconds)
