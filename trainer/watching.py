"""What is watched of a run beside what every record has: how often, and on which ranks."""

from dataclasses import dataclass, field

from rowwise.conf.option import MayChange
from rowwise.optim.lengths import RunLength


@dataclass(frozen=True)
class LogConfig:
    """`norms_every`: how often a record has norms of every parameter (see `norms`); `ranks_every`: how often it names the
    slowest rank (see `profile`). 0 = never."""

    norms_every: MayChange[int | float | str] = 0
    ranks_every: MayChange[int | float | str] = 0

    def with_norms(self, step: int, run: RunLength) -> bool:
        """Whether the record of this step has norms."""
        return run.due(self.norms_every, step)

    def with_ranks(self, step: int, run: RunLength) -> bool:
        """Whether the record of this step names the slowest rank."""
        return run.due(self.ranks_every, step)


MOST_PROFILED = 100  # steps: a trace has megabytes of each


@dataclass(frozen=True)
class ProfileConfig:
    """`steps`: the first and the last that are profiled (empty: none); `ranks`: which ranks profile theirs (null: all)."""

    steps: MayChange[list[int]] = field(default_factory=list)
    ranks: MayChange[list[int] | None] = field(default_factory=lambda: [0])

    def of(self, step: int) -> bool:
        """Whether this step is one of them."""
        return bool(self.steps) and self.steps[0] <= step <= self.steps[-1]


def check_profile(config: ProfileConfig, steps: int | None, world_size: int) -> None:
    """Raises ValueError. `steps`: of the run, where they are known."""
    if config.steps and not (len(config.steps) == 2 and 1 <= config.steps[0] <= config.steps[1]):
        raise ValueError(
            f"profile.steps={config.steps}: give the first step and the last, such as [20,25], or [] for none"
        )
    if config.steps and config.steps[1] - config.steps[0] >= MOST_PROFILED:
        raise ValueError(
            f"profile.steps={config.steps}: a trace has megabytes of each step; give at most {MOST_PROFILED} of them"
        )
    if config.steps and steps is not None and config.steps[1] > steps:
        raise ValueError(f"profile.steps={config.steps}: the run has {steps} steps, counted from 1; give some of those")
    wrong = [rank for rank in config.ranks or [] if not 0 <= rank < world_size]
    if wrong or config.ranks == []:
        raise ValueError(f"profile.ranks={config.ranks}: give some of 0 to {world_size - 1}, or null for all")
