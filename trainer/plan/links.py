"""How long messages take on a device's links."""

from dataclasses import dataclass

from rowwise.trainer.plan.devices import Device


@dataclass(frozen=True)
class Links:
    """How fast messages are on a device's links. Ranks are counted with ulysses, ring, shard, replicate and pipeline varying ever
    slower."""

    device: Device

    def machines(self, stride: int, size: int) -> tuple[int, int]:
        """Counts (machines that a group of ranks is on, its ranks on each)."""
        here = max(1, min(size, self.device.per_machine // stride))
        return -(-size // here), here

    def collective(self, whole: float, stride: int, size: int) -> float:
        """Estimates the seconds of a gather of `whole` bytes on every rank, or of a reduction to shares of it: each machine takes in
        what others have over all its network links, each device over its own."""
        if size == 1:
            return 0.0
        machines, here = self.machines(stride, size)
        inside = whole * (size - 1) / size / self.device.link
        outside = whole * (machines - 1) / machines / (here * self.device.network)
        return max(inside, outside) / self.device.reached("links")

    def exchange(self, mine: float, stride: int, size: int) -> float:
        """Estimates the seconds of an all-to-all of `mine` bytes a rank."""
        _, here = self.machines(stride, size)
        inside, outside = mine * (here - 1) / size / self.device.link, mine * (size - here) / size / self.device.network
        return max(inside, outside) / self.device.reached("links")

    def message(self, size: float, stride: int) -> float:
        """Estimates the seconds of a message to the next rank of an axis."""
        near = stride < self.device.per_machine
        return size / (self.device.link if near else self.device.network) / self.device.reached("links")
