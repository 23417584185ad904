"""What is watched of a run beside what every record has: how often, and on which ranks."""

from dataclasses import dataclass

from rowwise.optim.lengths import RunLength


@dataclass(frozen=True)
class LogConfig:
    """`norms_every`: how often a record has norms of every parameter (see `norms`; 0 = never)."""

    norms_every: int | float | str = 0

    def with_norms(self, step: int, run: RunLength) -> bool:
        """Whether the record of this step has them."""
        return run.due(self.norms_every, step)
