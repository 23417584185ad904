"""Bytes that come and go in the course of a step, by category; the most of each, and of all together that are on the device."""

CATEGORIES = (
    "parameters",
    "gathered",
    "gradients",
    "optimizer",
    "masks",
    "average",
    "activations",
    "loss",
    "messages",
    "working",
)
HOST, FILE = "host", "file"  # what waits in the host's memory, and in files
BESIDE = (HOST, FILE)  # the device


class Ledger:
    """What a rank holds now. `peaks`: the most of each category; `most`: of all together, which was held at `moment`, as
    `then`."""

    def __init__(self) -> None:
        self.now = dict.fromkeys((*CATEGORIES, *BESIDE), 0)
        self.peaks = dict(self.now)
        self.then = dict(self.now)
        self.most, self.moment, self.at = 0, "", ""
        self._total = 0

    def take(self, category: str, size: int) -> None:
        """Makes room for `size` bytes."""
        self.now[category] += size
        self._total += size if category not in BESIDE else 0
        self.peaks[category] = max(self.peaks[category], self.now[category])
        if self._total > self.most:
            self.most, self.moment, self.then = self._total, self.at, dict(self.now)

    def give(self, category: str, size: int) -> None:
        """Lets go of `size` bytes."""
        self.now[category] -= size
        self._total -= size if category not in BESIDE else 0
        assert self.now[category] >= 0, category

    def change(self, category: str, size: int) -> None:
        """Makes room for so many bytes, or lets go of them where that is below 0."""
        if size > 0:
            self.take(category, size)
        else:
            self.give(category, -size)

    def use(self, category: str, size: int, messages: int = 0) -> None:
        """Makes room for `size` bytes, `messages` of them of what crosses ranks, and lets go of them at once."""
        self.take("messages", messages)
        self.take(category, size - messages)
        self.give(category, size - messages)
        self.give("messages", messages)
