"""What goes between a device, its host's memory and files beside the computation, and how long that takes: activations, rows of
parameters and of gradients, states, and the steps that the host makes of them.

All ways are used at once, and beside the computation, so that a forward or a backward takes (Liao et al., *Fuyou*)

    T = max(computation, bytes of the link / its bandwidth, bytes of the disk / its bandwidth, steps on the host)

A link carries both directions at once, a disk reads or writes.
"""

from dataclasses import dataclass

from rowwise.parallel.activations.config import is_folder
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.plan.devices import Device
from rowwise.trainer.plan.states import widths_of

ADAMW_BYTES = (
    28  # that AdamW in 32 bits moves a number: parameter, gradient and two moments read, all but the gradient written
)


@dataclass(frozen=True)
class Traffic:
    """Bytes `up` to the device and `down` from it, `read` from files and `written` to them, and seconds of `steps` on the host."""

    up: float = 0.0
    down: float = 0.0
    read: float = 0.0
    written: float = 0.0
    steps: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.up + other.up,
            self.down + other.down,
            self.read + other.read,
            self.written + other.written,
            self.steps + other.steps,
        )

    def times(self, factor: float) -> "Traffic":
        """Gives so many times as much."""
        return Traffic(
            factor * self.up, factor * self.down, factor * self.read, factor * self.written, factor * self.steps
        )

    def seconds(self, device: Device) -> float:
        """Estimates how long it takes, all ways at once."""
        link = max(self.up, self.down) / device.host
        disk = self.read / device.disk_read + self.written / device.disk
        return max(max(link, disk) / device.reached("links"), self.steps)


NOTHING = Traffic()


def leaving(config: TrainConfig, size: float) -> tuple[Traffic, Traffic]:
    """Counts what so many bytes that layers keep move in their forward, and in their backward."""
    place = config.memory.offload_activations
    if place == "none":
        return NOTHING, NOTHING
    filed = size * is_folder(place)
    return Traffic(down=size, written=filed), Traffic(up=size, read=filed)


def rows(config: TrainConfig, device: Device, size: float, gradients: float) -> tuple[Traffic, Traffic]:
    """Counts what so many bytes of a rank's rows, and of their `gradients`, move in a forward that gathers them, and in a backward
    that does so and reduces their gradients."""
    memory = config.memory
    if memory.offload_params == "none":
        return NOTHING, NOTHING
    filed, gone = size * is_folder(memory.offload_params), gradients * is_folder(memory.offload_gradients)
    return Traffic(up=size * device.cuda, read=filed), Traffic(
        up=size * device.cuda, down=gradients * device.cuda, read=filed, written=gone
    )


def update(config: TrainConfig, device: Device, numbers: float, states: float) -> tuple[float, Traffic]:
    """Estimates an update of so many numbers with so many bytes of states: its seconds, in which parameters and states are read and
    written, and gradients read; and what of it goes on beside the backward, where it is made in that and on the host."""
    if config.memory.offload_states == "none":
        moved = numbers * 3 * widths_of(config).parameter + 2 * states
        return moved / device.bandwidth / device.reached("memory"), NOTHING
    traffic = step(config, device, numbers, states)
    return (0.0, traffic) if config.optim.in_backward else (traffic.seconds(device), NOTHING)


def step(config: TrainConfig, device: Device, numbers: float, states: float) -> Traffic:
    """Counts what a step of so many numbers with so many bytes of states moves where these wait off the device, on the host: both
    ways what changes, and gradients one way."""
    memory, size = config.memory, numbers * widths_of(config).parameter
    read = states * is_folder(memory.offload_states)
    changed = size * is_folder(memory.offload_params)
    gradients = size * is_folder(memory.offload_gradients)
    crossing = size if device.cuda and memory.offload_params == "none" else 0.0
    return Traffic(
        crossing, 2 * crossing, read + changed + gradients, read + changed, stepping(config, device, numbers, states)
    )


def stepping(config: TrainConfig, device: Device, numbers: float, states: float) -> float:
    """Estimates the seconds of a step on the host, by the bytes that it moves; a rule of 8-bit states by its own speed."""
    if config.optim.name.endswith("8bit"):
        return numbers / device.step_8bit
    moved = numbers * 3 * widths_of(config).parameter + 2 * states
    return moved / ADAMW_BYTES / device.step
