"""Ranks that go greedily by habits: schedules for measured times, from which a search goes on."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, starmap

from rowwise.parallel.pipeline_schedule.generate import Shape
from rowwise.parallel.pipeline_schedule.greedy import Ready, play
from rowwise.parallel.pipeline_schedule.order import Action, Schedule
from rowwise.parallel.pipeline_schedule.simulate import Costs

Placement = list[list[int]]


@dataclass(frozen=True)
class _Habits:
    """What a greedy rank does where it has a choice.

    `chunk` that goes first: the one "near" to the end of its pass, the one "far" from it, or that by "units" of p
    micro-batches. `ahead`: forwards up to the "limit" of memory, or as many as (interleaved) "1f1b". `prefers`: I or F
    where both are ready, or "turns". `weights`: W in "gaps", where nothing else is ready; "late", where memory or the end
    asks for it; "joined" with I in B."""

    chunk: str
    ahead: str
    prefers: str
    weights: str


def greedy_schedules(shape: Shape, costs: Costs, limit: float, placements: Sequence[Placement]) -> Iterator[Schedule]:
    """Yields a schedule for every set of habits, those that win more often first; no rank holds more than `limit`."""
    chunk = ("near", "units", "far") if shape.chunks > 1 else ("near",)
    choices = product(chunk, ("limit", "1f1b"), ("turns", "I", "F"), ("gaps", "joined", "late"))
    for habits, placement in product(starmap(_Habits, choices), placements):
        yield _played(shape, costs, limit, placement, habits)


def _played(shape: Shape, costs: Costs, limit: float, placement: Placement, habits: _Habits) -> Schedule:
    ranks = [_Rank(shape, costs, limit, rank, stages, habits) for rank, stages in enumerate(placement)]
    return play(placement, costs, lambda rank, ready: ranks[rank].choose(ready))


class _Rank:
    """A greedy rank: what it has done, and what it does next."""

    def __init__(self, shape: Shape, costs: Costs, limit: float, rank: int, stages: list[int], habits: _Habits):
        self._shape, self._costs, self._limit, self._habits = shape, costs, limit, habits
        self._held = {stage: costs.held[stage] for stage in stages}
        self._forwards, self._gradients = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)  # done
        self._weights = deque[Action]()  # of which I is done and W is not
        self._turn = "F"
        p, chunks = shape.ranks, shape.chunks
        way = p - rank if chunks == 1 else 2 * (p - rank - 1) + (chunks - 1) * p + 1
        self._most_ahead = way if habits.ahead == "1f1b" else shape.micro_batches * chunks

    def choose(self, ready: Ready) -> Action | None:
        count = self._shape.micro_batches
        forwards = (Action(stage, "F", i) for stage, i in self._forwards.items() if i < count)
        gradients = (Action(stage, "I", i) for stage, i in self._gradients.items() if i < self._forwards[stage])
        forward = min((a for a in forwards if ready(a) and self._admits(a)), key=self._order, default=None)
        gradient = min((a for a in gradients if ready(a)), key=self._order, default=None)
        if gradient and not (forward and self._turn == "F"):
            return self._do(gradient._replace(kind="B") if self._habits.weights == "joined" else gradient)
        if forward and self._keeps() + self._holds() + self._held[forward.stage] <= self._limit:
            return self._do(forward)
        done = all(i == count for i in self._gradients.values())
        if self._weights and (forward or done or self._habits.weights == "gaps"):
            return self._weights.popleft()
        return None

    def _do(self, action: Action) -> Action:
        if action.kind == "F":
            self._forwards[action.stage] += 1
        else:
            self._gradients[action.stage] += 1
            if action.kind == "I":
                self._weights.append(action._replace(kind="W"))
        prefers = self._habits.prefers
        self._turn = ("I" if action.kind == "F" else "F") if prefers == "turns" else prefers
        return action

    def _order(self, action: Action) -> tuple[int, int]:
        far = action.stage if action.kind == "F" else -action.stage
        unit = action.micro_batch // self._shape.ranks if self._habits.chunk == "units" else 0
        return unit, (-far if self._habits.chunk == "near" else far)

    def _holds(self) -> float:
        return sum(held * (self._forwards[stage] - self._gradients[stage]) for stage, held in self._held.items())

    def _keeps(self) -> float:
        return sum(self._costs.kept[action.stage] for action in self._weights)

    def _admits(self, forward: Action) -> bool:
        """Whether every micro-batch can still be finished after `forward`, one after another in their order, each with
        what those before it leave (the banker's algorithm). So the first unfinished one never waits for memory, whatever
        the other ranks do."""
        first, ahead = min(self._gradients.values()), sum(self._forwards.values()) - sum(self._gradients.values())
        if ahead >= self._most_ahead and forward.micro_batch > first:
            return False
        done = {**self._forwards, forward.stage: forward.micro_batch + 1}
        free = self._limit - self._holds() - self._held[forward.stage]
        for i in range(first, max(done.values())):
            if free < sum(held for stage, held in self._held.items() if done[stage] <= i):
                return False
            free += sum(held for stage, held in self._held.items() if self._gradients[stage] <= i < done[stage])
        return True
