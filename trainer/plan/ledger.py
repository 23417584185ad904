"""Bytes that come and go in the course of a step, by category; the most of each, and of all together."""

CATEGORIES = (
    "parameters",
    "gathered",
    "gradients",
    "optimizer",
    "masks",
    "activations",
    "loss",
    "messages",
    "working",
)


class Ledger:
    """What a rank holds now. `peaks`: the most of each category; `most`: of all together, which was held at `moment`, as
    `then`."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.peaks = dict(self.now)
        self.then = dict(self.now)
        self.most, self.moment, self.at = 0, "", ""
        self._total = 0

    def take(self, category: str, size: int) -> None:
        """Makes room for `size` bytes."""
        self.now[category] += size
        self._total += size
        self.peaks[category] = max(self.peaks[category], self.now[category])
        if self._total > self.most:
            self.most, self.moment, self.then = self._total, self.at, dict(self.now)

    def give(self, category: str, size: int) -> None:
        """Lets go of `size` bytes."""
        self.now[category] -= size
        self._total -= size
        assert self.now[category] >= 0, category

    def use(self, category: str, size: int) -> None:
        """Makes room for `size` bytes and lets go of them at once."""
        self.take(category, size)
        self.give(category, size)
