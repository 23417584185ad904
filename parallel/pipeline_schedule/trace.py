"""A timeline, simulated or measured, as JSON: for every rank, what it did and from when to when.

    {"unit": "seconds", "ranks": [[["0F0", 0.0, 1.0], ["0F1", 1.0, 2.0], ...], ...]}

`unit` is for those who open the file.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rowwise.parallel.pipeline_schedule.order import Action, Schedule, parse_action
from rowwise.parallel.pipeline_schedule.simulate import Timeline

Span = tuple[Action, float, float]


def align(spans_per_rank: Sequence[Sequence[Span]]) -> Timeline:
    """Returns the timeline of (action, start, end) as the ranks measured them, which counts from the first start of all.

    The ranks' clocks must tell the same time: those of one host, or since one epoch. The schedule is what was measured:
    each rank's actions in the order of its spans. Raises ValueError where there are none, or a rank goes back in time.
    """
    begin = min((start for spans in spans_per_rank for _, start, _ in spans), default=None)
    if begin is None:
        raise ValueError("no rank has spans; measure a step before its timeline is made")
    return _timeline([[(action, a - begin, b - begin) for action, a, b in spans] for spans in spans_per_rank])


def write_trace(timeline: Timeline, path: Path, unit: str = "seconds") -> None:
    """Writes `timeline` as `read_trace` reads it, to the last digit."""
    lines = [
        json.dumps([[str(action), a, b] for action, a, b in zip(*rank, strict=True)])
        for rank in zip(timeline.schedule.ranks, timeline.starts, timeline.ends, strict=True)
    ]
    path.write_text(f'{{"unit": {json.dumps(unit)}, "ranks": [\n' + ",\n".join(lines) + "\n]}\n")


def read_trace(path: Path) -> Timeline:
    """Reads the timeline in `path`. Raises ValueError, which names the file and what is wrong in it."""
    try:
        content = json.loads(path.read_text())
        ranks = content.get("ranks") if isinstance(content, dict) else None
        if not isinstance(ranks, list) or not all(isinstance(entries, list) for entries in ranks):
            raise ValueError('no list "ranks" of a list a rank')
        if not any(ranks):
            raise ValueError("no rank did anything")
        return _timeline([[_span(rank, entry) for entry in entries] for rank, entries in enumerate(ranks)], str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a timeline that was written") from None
    except ValueError as error:
        raise ValueError(f"{path} is no timeline: {error}") from None


def _span(rank: int, entry: Any) -> Span:
    match entry:
        case [str(text), int() | float() as start, int() | float() as end]:
            return parse_action(text), float(start), float(end)
    raise ValueError(f'rank {rank}: {json.dumps(entry)} is not [action, start, end], such as ["2F0", 1.5, 2.0]')


def _timeline(spans_per_rank: Sequence[Sequence[Span]], source: str = "") -> Timeline:
    for rank, spans in enumerate(spans_per_rank):
        clock = -math.inf
        for action, start, end in spans:
            if not clock <= start <= end < math.inf:
                raise ValueError(
                    f"rank {rank}: {action} goes from {start:g} to {end:g} after {clock:g}; the spans of a rank follow "
                    "each other"
                )
            clock = end
    timeline = Timeline(
        Schedule(tuple(tuple(action for action, _, _ in spans) for spans in spans_per_rank), source),
        [[start for _, start, _ in spans] for spans in spans_per_rank],
        [[end for _, _, end in spans] for spans in spans_per_rank],
    )
    if timeline.makespan == 0:
        raise ValueError("nothing in it takes time")
    return timeline
