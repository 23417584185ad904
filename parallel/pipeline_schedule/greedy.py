"""Makes a schedule by playing it through: whenever a rank is free, a policy says what it does next."""

import heapq
from collections.abc import Callable, Sequence

from rowwise.parallel.pipeline_schedule.order import Action, Schedule
from rowwise.parallel.pipeline_schedule.simulate import Costs

Ready = Callable[[Action], bool]
Choose = Callable[[int, Ready], Action | None]


def play(placement: Sequence[Sequence[int]], costs: Costs, choose: Choose) -> Schedule:
    """Makes a schedule action by action. `placement[r]`: the stages of rank r. `choose(rank, ready)` names the next action of a free
    rank, one that is `ready`, or None to wait for what arrives next. Ends when nothing arrives any more."""
    rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
    last = len(rank_of) - 1
    arrival: dict[tuple[int, bool, int], float] = {}  # (stage, forward, micro-batch) -> when its input is on its rank
    orders: list[list[Action]] = [[] for _ in placement]
    clocks = [0.0] * len(placement)
    events = [(0.0, rank) for rank in range(len(placement))]
    while events:
        now, rank = heapq.heappop(events)
        if clocks[rank] > now:
            continue

        def ready(action: Action, now: float = now) -> bool:
            stage, kind, i = action
            if kind == "W" or (kind == "F" and stage == 0) or (kind != "F" and stage == last):
                return True
            return arrival.get((stage, kind == "F", i), float("inf")) <= now

        action = choose(rank, ready)
        if action is None:
            continue
        orders[rank].append(action)
        clocks[rank] = now + costs.seconds(action)
        heapq.heappush(events, (clocks[rank], rank))
        target = action.stage + (1 if action.kind == "F" else -1)
        if action.kind != "W" and target in rank_of:
            arrives = clocks[rank] + (costs.send if rank_of[target] != rank else 0.0)
            arrival[target, action.kind == "F", action.micro_batch] = arrives
            heapq.heappush(events, (arrives, rank_of[target]))
    return Schedule(tuple(tuple(order) for order in orders))
