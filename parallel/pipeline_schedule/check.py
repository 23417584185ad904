"""Whether a schedule can be carried out, and what it holds.

Messages between two ranks arrive in the order in which they are sent, and a send never waits (`parallel.pipeline`), so a
schedule is free of deadlock exactly if its actions can be done in some order that respects every rank's own.
"""

from collections import Counter

from rowwise.parallel.pipeline_schedule.order import Action, Schedule
from rowwise.parallel.pipeline_schedule.simulate import Deadlock, peak_activations, simulate, uniform_costs


def check_schedule(schedule: Schedule, ranks: int, stages: int, micro_batches: int) -> list[float]:
    """Refuses a schedule that does not do every micro-batch's forward and backward once on every stage, does them in an
    impossible order, or never ends. Raises ValueError, which names the line. Returns the most activations that each rank
    holds, counted in stages."""
    if len(schedule.ranks) != ranks:
        raise ValueError(
            f"{schedule.source} has {len(schedule.ranks)} lines for parallel.pipeline={ranks}; write a line a rank"
        )
    _check_placement(schedule, stages)
    _check_counts(schedule, stages, micro_batches)
    for rank, actions in enumerate(schedule.ranks):
        _check_order(schedule, rank, actions)
    try:
        simulate(schedule, uniform_costs(stages))
    except Deadlock as deadlock:
        raise ValueError(_explain(schedule, deadlock.blocked)) from None
    return [peak_activations(actions, uniform_costs(stages)) for actions in schedule.ranks]


def _where(schedule: Schedule, rank: int) -> str:
    line = f"line {schedule.lines[rank]}" if schedule.lines else f"rank {rank}"
    return f"{schedule.source}, {line}" if schedule.source else line


def _check_placement(schedule: Schedule, stages: int) -> None:
    found = sorted(schedule.rank_of)
    if found != list(range(stages)):
        raise ValueError(
            f"{schedule.source} names stages {found}; parallel.pipeline x parallel.virtual_stages = {stages} asks for "
            f"0 to {stages - 1}"
        )
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            raise ValueError(f"{_where(schedule, rank)} is empty: every rank has work")
        for action in actions:
            if (holder := schedule.rank_of[action.stage]) != rank:
                raise ValueError(
                    f"{_where(schedule, rank)}: {action} is of stage {action.stage}, which "
                    f"{_where(schedule, holder)} has; a stage is on one rank"
                )


def _check_counts(schedule: Schedule, stages: int, micro_batches: int) -> None:
    counts = Counter(action for actions in schedule.ranks for action in actions)
    for action, count in counts.items():
        where = _where(schedule, schedule.rank_of[action.stage])
        if action.micro_batch >= micro_batches:
            raise ValueError(f"{where}: {action} is beyond the {micro_batches} micro-batches of a step")
        if count > 1:
            raise ValueError(f"{where}: {action} stands there {count} times")
    for stage in range(stages):
        where = _where(schedule, schedule.rank_of[stage])
        for i in range(micro_batches):
            missing = [Action(stage, kind, i) for kind in "FIWB" if not counts[Action(stage, kind, i)]]
            kinds = "".join(action.kind for action in missing)
            if kinds in ("B", "IW"):
                continue
            if "F" in kinds:
                raise ValueError(f"{where}: {missing[0]} is missing")
            given = [str(Action(stage, kind, i)) for kind in "IWB" if kind not in kinds]
            raise ValueError(
                f"{where}: stage {stage}, micro-batch {i} wants either B, or I and W; there is {', '.join(given) or 'none'}"
            )


def _check_order(schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    done: set[Action] = set()
    for action in actions:
        before = {"I": "F", "B": "F", "W": "I"}.get(action.kind)
        if before and (needed := action._replace(kind=before)) not in done:
            raise ValueError(f"{_where(schedule, rank)}: {action} stands before {needed}, which it needs")
        done.add(action)


def _explain(schedule: Schedule, blocked: dict[int, int]) -> str:
    """Follows what each rank waits for until a rank comes again."""
    rank, seen, told = min(blocked), set[int](), []
    while rank not in seen:
        seen.add(rank)
        action = schedule.ranks[rank][blocked[rank]]
        source = action.stage + (-1 if action.kind == "F" else 1)
        kind = "F" if action.kind == "F" else "I or B"
        told.append(f"{_where(schedule, rank)} stops at {action}, which waits for {kind} of stage {source}")
        rank = schedule.rank_of[source]
    return f"the ranks wait for each other in a circle: {'; '.join(told)}"
