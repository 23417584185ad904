"""What the host asks of a device beside arithmetic, without ever waiting for all that it does.

A GPU works off several streams side by side. A receive of NCCL is in one of them, and ends when another rank sends. So a
host that waits for its whole device (`torch.cuda.synchronize`) while a receive is posted waits for that rank, which may be
waiting for this one. Here it waits for marks, which it sets in the current stream between what it asks for, and for nothing
else.
"""

import time
import warnings
import weakref
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a stream; an event of CUDA is one."""

    def synchronize(self) -> None:
        """Returns when the stream has come to it."""

    def elapsed_time(self, later) -> float:
        """Returns the milliseconds from here to a later one, both of which the stream has come to."""


class Copies(Protocol):
    """Copies between a device and the host, beside what it computes."""

    def away(self, t: Tensor) -> tuple[Tensor, Mark]:
        """Begins a copy of `t` on the host, once it is computed, and marks its end; `t` must live until then."""

    def back(self, here: Tensor) -> tuple[Tensor, Mark]:
        """Begins a copy of `here` on the device, and marks its end; `here` may be let go of at once."""

    def over(self, here: Tensor, t: Tensor) -> Mark:
        """Begins to copy `here` over `t`, which is on the device and which nothing computes with until the end is marked."""

    def join(self, t: Tensor, mark: Mark) -> None:
        """Has all that is computed from now on wait for the mark, after which it may use `t`, or its memory."""


class Device(Protocol):
    """A kind of device. `pins`: whether it copies to the host by itself, into pinned memory."""

    pins: bool

    def mark(self) -> Mark:
        """Sets a mark in the current stream."""

    def own_stream(self) -> None:
        """Gives the calling thread this device and a stream of its own on it: what it waits for is its own work."""

    def pin(self, memory: Tensor) -> None:
        """Pins host memory for as long as it is used."""

    def copies(self) -> Copies:
        """Opens streams for copies to the host and back."""


@dataclass(frozen=True)
class Moment:
    """When a host did what it was asked for, which it does at once."""

    seconds: float

    def synchronize(self) -> None:
        """Does nothing: a moment on the CPU has come already."""

    def elapsed_time(self, later: "Moment") -> float:
        return (later.seconds - self.seconds) * 1e3


class HostCopies:
    """Copies of the host's own memory, which are made at once; there is nowhere to bring them back to."""

    def away(self, t: Tensor) -> tuple[Tensor, Mark]:
        return t.clone(), Moment(time.perf_counter())

    def back(self, here: Tensor) -> tuple[Tensor, Mark]:
        return here, Moment(time.perf_counter())

    def over(self, here: Tensor, t: Tensor) -> Mark:
        t.copy_(here)
        return Moment(time.perf_counter())

    def join(self, t: Tensor, mark: Mark) -> None: ...


class GpuCopies:
    """Copies of a GPU, in two streams: one out, one back."""

    def __init__(self, device: torch.device):
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def away(self, t: Tensor) -> tuple[Tensor, Mark]:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            here = torch.empty_like(t, device="cpu", pin_memory=True)
            here.copy_(t, non_blocking=True)
            return here, self._out.record_event()

    def back(self, here: Tensor) -> tuple[Tensor, Mark]:
        self._back.wait_stream(self._out)  # what left last may come back first
        with torch.cuda.stream(self._back):
            t = here.to(self._device, non_blocking=True)
            return t, self._back.record_event()

    def over(self, here: Tensor, t: Tensor) -> Mark:
        with torch.cuda.stream(self._back):
            t.copy_(here, non_blocking=True)
            return self._back.record_event()

    def join(self, t: Tensor, mark: Mark) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(mark)  # type: ignore[arg-type]
        t.record_stream(stream)


class Host:
    """The CPU: no streams, and memory that is the host's."""

    pins = False

    def mark(self) -> Moment:
        return Moment(time.perf_counter())

    def own_stream(self) -> None: ...

    def pin(self, memory: Tensor) -> None: ...

    def copies(self) -> Copies:
        return HostCopies()


@dataclass(frozen=True)
class Gpu:
    """A GPU of CUDA."""

    device: torch.device
    pins = True

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def own_stream(self) -> None:
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def pin(self, memory: Tensor) -> None:
        # Where it lies: torch's own pinned memory comes in powers of two, up to twice as much as is asked for.
        cudart = torch.cuda.cudart()
        if error := int(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
            warnings.warn(
                f"{memory.nbytes:,} bytes of host memory cannot be pinned (CUDA error {error}): copies to it are slower",
                stacklevel=2,
            )
        else:
            weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr()).atexit = False

    def copies(self) -> Copies:
        return GpuCopies(self.device)


def device_of(device: torch.device) -> Device:
    """Returns what to ask of `device`."""
    return Gpu(device) if device.type == "cuda" else Host()


class Clock:
    """Tells when the marks of a device were reached, in seconds since the epoch, by a clock that is never set back."""

    def __init__(self, device: Device):
        self._device, self._first = device, device.mark()
        self._first.synchronize()
        self._began = time.time()

    def mark(self) -> Mark:
        """Sets a mark; the host goes on."""
        return self._device.mark()

    def seconds(self, mark: Mark) -> float:
        """Returns when the device came to `mark`. Waits until it has."""
        mark.synchronize()
        return self._began + self._first.elapsed_time(mark) / 1e3
