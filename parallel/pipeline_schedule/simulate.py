"""How long a schedule takes, and what it holds, from the times of its parts.

A rank does one action at a time, in its order; an action begins when the rank is free and what it needs has arrived. A
message leaves at the end of the action that makes it and arrives `send` later; messages do not delay each other.

Where weights are gathered before use (ZeRO-3), `gathers` cuts a rank's order into runs that share one gather. The gather
of a run starts when the run before it begins, one at a time a rank. W needs no weights, and so no gather.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rowwise.parallel.pipeline_schedule.order import Action, Schedule

Gathering = Literal["none", "micro_batch", "run"]


@dataclass(frozen=True)
class Costs:
    """Seconds (any unit, the same for all) and memory, an entry a stage. `forward`, `input`, `weight`: of F, I and W; B
    takes I + W. `gather`: to gather the weights of the stage. `held`: activations from F to I; `kept`: of these, from I
    to W. `send`: of one message between ranks; `step`: of the optimizer."""

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    gather: tuple[float, ...]
    held: tuple[float, ...]
    kept: tuple[float, ...]
    send: float = 0.0
    step: float = 0.0

    def seconds(self, action: Action) -> float:
        """Returns what `action` takes."""
        stage = action.stage
        if action.kind == "F":
            return self.forward[stage]
        if action.kind == "I":
            return self.input[stage]
        return self.weight[stage] + (self.input[stage] if action.kind == "B" else 0.0)


def uniform_costs(
    stages: int,
    forward: float = 1.0,
    input: float = 1.0,
    weight: float = 1.0,
    send: float = 0.0,
    gather: float = 0.0,
    step: float = 0.0,
    held: float = 1.0,
    kept: float = 1.0,
) -> Costs:
    """Returns the costs of stages that are all alike."""

    def each(value: float) -> tuple[float, ...]:
        return (value,) * stages

    return Costs(each(forward), each(input), each(weight), each(gather), each(held), each(kept), send, step)


class Deadlock(ValueError):
    """Ranks wait for each other. `blocked`: rank -> how many of its actions were done."""

    def __init__(self, blocked: dict[int, int]):
        super().__init__(f"ranks {sorted(blocked)} wait for each other")
        self.blocked = blocked


@dataclass(frozen=True)
class Timeline:
    """One step. `starts` and `ends`: a list a rank, an entry an action, in the order of the schedule."""

    schedule: Schedule
    starts: list[list[float]]
    ends: list[list[float]]

    @cached_property
    def makespan(self) -> float:
        """The time from the first start to the last end."""
        return max(e[-1] for e in self.ends if e) - min(s[0] for s in self.starts if s)

    @cached_property
    def busy(self) -> float:
        """Working time over all ranks."""
        return sum(sum(e) - sum(s) for s, e in zip(self.starts, self.ends, strict=True))

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they wait."""
        return 1 - self.busy / (len(self.ends) * self.makespan)


def simulate(
    schedule: Schedule, costs: Costs, begin: Sequence[float] | None = None, gathering: Gathering = "none"
) -> Timeline:
    """Simulates the timeline of one step. `begin`: when each rank is free. Raises Deadlock where ranks wait for each other."""
    ranks, last, count = len(schedule.ranks), schedule.stages - 1, schedule.micro_batches
    rank_of = [schedule.rank_of[stage] for stage in range(last + 1)]
    # (stage, micro-batch) -> when its output, and the gradient of its input, are there; negative: not yet.
    forward_done = [-1.0] * ((last + 1) * count)
    input_done = [-1.0] * ((last + 1) * count)
    waiting: dict[tuple[bool, int], int] = {}
    starts: list[list[float]] = [[] for _ in range(ranks)]
    ends: list[list[float]] = [[] for _ in range(ranks)]
    clocks = list(begin) if begin is not None else [0.0] * ranks
    weights = [_Gathers(actions, costs, gathering, clocks[r]) for r, actions in enumerate(schedule.ranks)]
    runnable = list(range(ranks))
    while runnable:
        rank = runnable.pop()
        actions, start_of, end_of, clock = schedule.ranks[rank], starts[rank], ends[rank], clocks[rank]
        for action in actions[len(end_of) :]:
            stage, kind, i = action
            start = clock
            if kind == "F":
                needs, done, source = (stage > 0), forward_done, stage - 1
            else:
                needs, done, source = (kind != "W" and stage < last), input_done, stage + 1
            if needs:
                arrived = done[source * count + i]
                if arrived < 0:
                    waiting[kind == "F", source * count + i] = rank
                    break
                start = max(start, arrived + (costs.send if rank_of[source] != rank else 0.0))
            start = weights[rank].wait(len(end_of), start)
            clock = start + costs.seconds(action)
            start_of.append(start)
            end_of.append(clock)
            if kind == "W":
                continue
            (forward_done if kind == "F" else input_done)[stage * count + i] = clock
            waiter = waiting.pop((kind == "F", stage * count + i), None)
            if waiter is not None:
                runnable.append(waiter)
        clocks[rank] = clock
    if waiting:
        raise Deadlock({rank: len(ends[rank]) for rank in waiting.values()})
    return Timeline(schedule, starts, ends)


class _Gathers:
    """The gathers of one rank: each starts when the run before it begins."""

    def __init__(self, actions: Sequence[Action], costs: Costs, gathering: Gathering, begin: float):
        self._runs = [(at, costs.gather[actions[at].stage]) for at in gathers(actions, gathering)]
        self._next = 0
        self._ready = begin + self._runs[0][1] if self._runs else begin  # when the next run's weights are there

    def wait(self, position: int, start: float) -> float:
        """When the action at `position`, which could begin at `start`, has its weights."""
        if self._next == len(self._runs) or self._runs[self._next][0] != position:
            return start
        start = max(start, self._ready)
        self._next += 1
        if self._next < len(self._runs):
            self._ready = start + self._runs[self._next][1]
        return start


def gathers(actions: Sequence[Action], gathering: Gathering) -> list[int]:
    """Returns the positions in a rank's order before which weights are gathered: `micro_batch`, of every F, I and B; `run`, of
    those that use another stage than the one before."""
    positions: list[int] = []
    held = -1
    for position, action in enumerate(actions):
        if gathering == "none" or action.kind == "W":
            continue
        if gathering == "micro_batch" or action.stage != held:
            positions.append(position)
        held = action.stage
    return positions


def peak_activations(actions: Sequence[Action], costs: Costs) -> float:
    """Returns the most that a rank holds at once: `held` of a stage from the start of F to the end of I or B, and `kept` from
    the end of I to the end of W."""
    now = peak = 0.0
    for stage, kind, _ in actions:
        if kind == "F":
            now += costs.held[stage]
            peak = max(peak, now)
        elif kind == "I":
            # While I works, what it leaves for W already stands beside what it still needs; the larger is counted.
            now += costs.kept[stage] - costs.held[stage]
            peak = max(peak, now)
        else:
            now -= costs.kept[stage] if kind == "W" else costs.held[stage]
    return peak


def period(
    schedule: Schedule, costs: Costs, synchronised: bool = True, gathering: Gathering = "none"
) -> tuple[float, float]:
    """Returns (seconds, bubble share) of a step in the steady state of a run, the optimizer step included.

    `synchronised`: every rank waits for the last before it changes its weights; else each goes on by itself, and a step
    takes as long as the rank that is first and last at work is at it (Qi et al., section 4).
    """
    if synchronised:
        timeline = simulate(schedule, costs, gathering=gathering)
        seconds = max(ends[-1] for ends in timeline.ends if ends) + costs.step  # a first gather counts, too
        return seconds, 1 - (timeline.busy / len(schedule.ranks) + costs.step) / seconds
    clocks, seconds = [0.0] * len(schedule.ranks), 0.0
    for _ in range(4 * len(schedule.ranks) + 4):
        timeline = simulate(schedule, costs, clocks, gathering)
        after = [ends[-1] + costs.step for ends in timeline.ends]
        taken = [b - a for a, b in zip(clocks, after, strict=True)]
        clocks, seconds = after, max(taken)
        if max(taken) - min(taken) <= 1e-12 * seconds:
            break
    return seconds, 1 - (timeline.busy / len(schedule.ranks) + costs.step) / seconds
