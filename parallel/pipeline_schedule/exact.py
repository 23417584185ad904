"""The shortest order of all, as an integer programme (Qi et al., *Zero Bubble Pipeline Parallelism*, section 3).

Unknown are the start t_a of every action a, the makespan C and, for two actions a and b of one rank whose order nothing
else settles, x_ab: 1 where a goes first, 0 where b does. With d_a the time of a:

    minimise C  subject to
    t_a + d_a <= C                                                  every a
    t_a + d_a (+ send) <= t_b                                       b needs a
    t_a + d_a <= t_b + M (1 - x_ab), t_b + d_b <= t_a + M' x_ab     a, b on one rank; M, M' from the windows of a and b
    held_a + sum over b of its rank of g_b x_ba <= limit            every forward a; g of F: held, I: kept - held, W: -kept
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rowwise.parallel.pipeline_schedule.order import Action, Schedule
from rowwise.parallel.pipeline_schedule.simulate import Costs

Row = tuple[dict[int, float], float]  # unknown -> coefficient, and what their sum may reach at most
_STRETCH = 1 + 1e-7  # a makespan known to be possible stays so when rounded


def solve(
    placement: Sequence[Sequence[int]],
    micro_batches: int,
    costs: Costs,
    limit: float,
    upper: float,
    time_limit: float,
) -> tuple[Schedule, bool] | None:
    """Finds the schedule with the shortest makespan on `placement` (`placement[r]`: the stages of rank r) of which no rank holds
    more than `limit`, and whether it is proved to be the shortest (to the solver's 1e-6 of `upper`). I and W are apart
    throughout: B is an I with its W right behind, and sends later. None where no makespan up to `upper` is possible or
    none was found in `time_limit` seconds. Raises ValueError where a stage keeps more after I than it held before."""
    if any(kept > held for kept, held in zip(costs.kept, costs.held, strict=True)):
        raise ValueError(
            f"kept={costs.kept} exceeds held={costs.held}: the integer programme counts memory where forwards begin, and "
            "then an I could be the peak; give kept <= held on every stage"
        )
    known = _known(placement, micro_batches, costs, upper)
    if (known.earliest > known.latest).any():
        return None
    makespan, unknowns = len(known.actions), len(known.actions) + 1 + len(known.undecided)
    rows = [*_time_rows(known), *_memory_rows(known, costs, limit)]
    least, most = np.zeros(unknowns), np.ones(unknowns)
    least[:makespan], most[:makespan] = known.earliest, known.latest
    least[makespan], most[makespan] = known.shortest, _STRETCH
    result = milp(
        c=np.arange(unknowns) == makespan,
        constraints=LinearConstraint(_matrix(rows, unknowns), ub=[most for _, most in rows]),
        bounds=Bounds(least, most),
        integrality=np.arange(unknowns) > makespan,
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    middle = result.x[:makespan] + known.seconds / 2
    orders = (sorted(rank, key=lambda a: middle[a]) for rank in known.of_rank)
    return Schedule(tuple(tuple(known.actions[a] for a in order) for order in orders)), result.status == 0


@dataclass(frozen=True)
class _Known:
    """What holds before anything is decided. Actions go by number; times are in units of `upper`.

    `apart[a, b]`: b starts at least so long after a, -inf where nothing is known. `earliest`, `latest`: the window of a
    start. `shortest`: no makespan is below. `undecided`: pairs of a rank whose order is open -> the unknown that says."""

    actions: list[Action]
    of_rank: list[list[int]]
    seconds: np.ndarray
    apart: np.ndarray
    edges: list[tuple[int, int, float]]
    earliest: np.ndarray
    latest: np.ndarray
    shortest: float
    undecided: dict[tuple[int, int], int]


def _known(placement: Sequence[Sequence[int]], micro_batches: int, costs: Costs, upper: float) -> _Known:
    rank_of = {stage: rank for rank, stages in enumerate(placement) for stage in stages}
    actions = [Action(stage, kind, i) for stage in sorted(rank_of) for kind in "FIW" for i in range(micro_batches)]
    of_rank = [[a for a, action in enumerate(actions) if action.stage in stages] for stages in placement]
    seconds = np.array([costs.seconds(action) for action in actions]) / upper
    number = {action: a for a, action in enumerate(actions)}
    edges = []
    for a, action in enumerate(actions):
        for after in _followers(action):
            if (b := number.get(after)) is not None:
                sent = rank_of[after.stage] != rank_of[action.stage]
                edges.append((a, b, seconds[a] + (costs.send / upper if sent else 0.0)))
    apart = np.full((len(actions), len(actions)), -np.inf)
    np.fill_diagonal(apart, 0.0)
    for a, b, lag in edges:
        apart[a, b] = max(apart[a, b], lag)
    for via in range(len(actions)):
        np.maximum(apart, apart[:, via, None] + apart[via], out=apart)
    earliest = apart.max(axis=0)
    latest = _STRETCH - (apart + seconds).max(axis=1)
    shortest = max(earliest[rank].min() + seconds[rank].sum() for rank in of_rank)
    # a before b: b needs a, perhaps through others, or b would have no time to go first.
    before = (apart > -np.inf) | (earliest + seconds > latest[:, None])
    open_pairs = [(a, b) for rank in of_rank for a, b in combinations(rank, 2) if not before[a, b] | before[b, a]]
    undecided = {pair: len(actions) + 1 + n for n, pair in enumerate(open_pairs)}
    return _Known(actions, of_rank, seconds, apart, edges, earliest, latest, float(shortest), undecided)


def _followers(action: Action) -> list[Action]:
    """What must come after `action`; some may not exist.

    Micro-batches are alike, so they may go in their order through every stage and kind, and no makespan is lost: renumber
    a stage's F (I, W) by their starts; the k-th still starts after the k-th of what it needs is done, since k of those had
    to be done for k of these to start. Memory asks only how many were done.
    """
    stage, kind, i = action
    needed_by = {"F": [(stage + 1, "F"), (stage, "I")], "I": [(stage - 1, "I"), (stage, "W")], "W": []}[kind]
    return [Action(*after, i) for after in needed_by] + [Action(stage, kind, i + 1)]


def _time_rows(known: _Known) -> Iterator[Row]:
    makespan = len(known.actions)
    for a, seconds in enumerate(known.seconds):
        yield {a: 1.0, makespan: -1.0}, -seconds
    for a, b, lag in known.edges:
        yield {a: 1.0, b: -1.0}, -lag
    for rank in known.of_rank:
        for a, b in permutations(rank, 2):
            if (a, b) in known.undecided or (b, a) in known.undecided:
                # t_a + d_a - t_b is at most this big where b goes first.
                big = known.latest[a] + known.seconds[a] - known.earliest[b]
                factor, constant = _precedes(known, a, b)
                row = {a: 1.0, b: -1.0, **{x: big * value for x, value in factor.items()}}
                yield row, big * (1 - constant) - known.seconds[a]
            elif _precedes(known, a, b)[1]:
                yield {a: 1.0, b: -1.0}, -known.seconds[a]


def _memory_rows(known: _Known, costs: Costs, limit: float) -> Iterator[Row]:
    for rank in known.of_rank:
        for a in rank:
            stage, kind, _ = known.actions[a]
            if kind != "F":
                continue
            row: dict[int, float] = {}
            room = limit * (1 + 1e-9) - costs.held[stage]
            for b in rank:
                if a == b:
                    continue
                held, kept = costs.held[known.actions[b].stage], costs.kept[known.actions[b].stage]
                grows = {"F": held, "I": kept - held, "W": -kept}[known.actions[b].kind]
                factor, constant = _precedes(known, b, a)
                room -= grows * constant
                for x, value in factor.items():
                    row[x] = row.get(x, 0.0) + grows * value
            yield row, room


def _precedes(known: _Known, a: int, b: int) -> tuple[dict[int, float], float]:
    """Whether a goes before b on their rank, 0 or 1, as factors of unknowns plus a constant."""
    if (a, b) in known.undecided:
        return {known.undecided[a, b]: 1.0}, 0.0
    if (b, a) in known.undecided:
        return {known.undecided[b, a]: -1.0}, 1.0
    first = known.apart[a, b] > -np.inf or known.earliest[b] + known.seconds[b] > known.latest[a]
    return {}, float(first)


def _matrix(rows: list[Row], unknowns: int) -> csr_array:
    entries = [(n, x, value) for n, (row, _) in enumerate(rows) for x, value in row.items()]
    lines, columns, values = zip(*entries, strict=True)
    return csr_array((values, (lines, columns)), shape=(len(rows), unknowns))
