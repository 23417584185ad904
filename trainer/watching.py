"""What is watched of a run beside what every record has: how often, and on which ranks."""

from dataclasses import dataclass, field

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.optim.lengths import RunLength


@dataclass(frozen=True)
class LogConfig:
    """`norms_every`: how often a record has the norm of every parameter, gradient and update (an interval; 0: never).
    `ranks_every`: how often a record names the slowest rank and its own seconds beside the median rank's (an interval; 0:
    never); such a step is profiled, and takes longer."""

    norms_every: MayChange[int | float | str] = 0
    ranks_every: MayChange[int | float | str] = 0

    def with_norms(self, step: int, run: RunLength) -> bool:
        """Says whether the record of this step has norms."""
        return run.due(self.norms_every, step)

    def with_ranks(self, step: int, run: RunLength) -> bool:
        """Says whether the record of this step names the slowest rank."""
        return run.due(self.ranks_every, step)


MOST_PROFILED = 100  # steps: a trace has megabytes of each


@dataclass(frozen=True)
class ProfileConfig:
    """`steps`: the first and the last whose time is traced into `runs/NAME/profile`, such as [20,25] (empty: none).
    `ranks`: which ranks trace theirs (null: all). `memory_step`: the step of which they write what is held (0: none): torch's memory
    snapshot on a GPU, what is there at the peak, by the operation that made it, on a CPU."""

    steps: MayChange[list[int]] = field(default_factory=list)
    ranks: MayChange[list[int] | None] = field(default_factory=lambda: [0])
    memory_step: MayChange[int] = 0

    def of(self, step: int) -> bool:
        """Says whether the step is one of those that are profiled."""
        return bool(self.steps) and self.steps[0] <= step <= self.steps[-1]


PROFILE: Refusals = (
    Refusal(
        ("profile.steps",),
        lambda run: (
            run.profile.steps
            and not (len(run.profile.steps) == 2 and 1 <= run.profile.steps[0] <= run.profile.steps[1])
        ),
        "profile.steps={profile.steps}: give the first step and the last, such as [20,25], or [] for none",
    ),
    Refusal(
        ("profile.steps",),
        lambda run: run.profile.steps and run.profile.steps[1] - run.profile.steps[0] >= MOST_PROFILED,
        f"profile.steps={{profile.steps}}: a trace has megabytes of each step; give at most {MOST_PROFILED} of them",
    ),
    Refusal(
        ("profile.steps", "steps"),
        lambda run: run.profile.steps and run.known_steps is not None and run.profile.steps[1] > run.steps,
        "profile.steps={profile.steps}: the run has {steps} steps, counted from 1; give some of those",
    ),
    Refusal(
        ("profile.memory_step", "steps"),
        lambda run: (
            run.profile.memory_step < 0 or (run.known_steps is not None and run.profile.memory_step > run.known_steps)
        ),
        "profile.memory_step={profile.memory_step}: give one of the {steps} steps, counted from 1, or 0 for none",
    ),
    Refusal(
        ("profile.ranks",),
        lambda run: (
            run.profile.ranks == [] or not all(0 <= r < run.parallel.world_size for r in run.profile.ranks or [])
        ),
        lambda run: (
            f"profile.ranks={run.profile.ranks}: give some of 0 to {run.parallel.world_size - 1}, or null for all"
        ),
    ),
)


def check_watched(compiled: bool, memory_step: int, device: str) -> None:
    """Refuses to write what a compiled step holds where nobody sees it. Raises ValueError."""
    if compiled and memory_step and device == "cpu":
        raise ValueError(
            f"profile.memory_step={memory_step} with compile=true: what a compiled layer makes is not seen on a CPU; give "
            "compile=false, or profile.memory_step=0"
        )
