"""Gains in the simulator, beside the papers': over 1f1b at equal memory (+23 %) and at more (+31 %; Qi et al., Zero Bubble),
and of blockwise over breadth-first under ZeRO-3 (+30 %; Tang et al., ZeroPP)."""

from collections.abc import Callable
from typing import Any

from rowwise.parallel.pipeline_schedule.generate import GENERATORS, Shape, make_schedule
from rowwise.parallel.pipeline_schedule.search import find_schedule
from rowwise.parallel.pipeline_schedule.simulate import Costs, Gathering, peak_activations, period, uniform_costs

SIZES = [(4, 12), (8, 24), (8, 64), (16, 48)]  # ranks, micro-batches
RATIOS = {"F = I = W": (1.0, 1.0, 1.0), "F = I = 2 W": (2.0, 2.0, 1.0)}
GATHER = 0.25  # of a chunk's weights, in units of its F


def over_1f1b(ranks: int, micro_batches: int, ratio: tuple[float, float, float]) -> dict[str, Any]:
    """Limit -> schedule -> gain in percent over 1f1b, which waits for every rank's step; the others do not where they
    are `unsynchronised`."""
    plain = Shape(ranks, 1, micro_batches)
    whole = uniform_costs(ranks, *ratio, send=0.03)
    half = uniform_costs(2 * ranks, *(t / 2 for t in ratio), send=0.03, held=0.5, kept=0.5)
    base, _ = period(make_schedule("1f1b", plain), whole)
    gains: dict[str, Any] = {}
    for times in (1, 2):
        rows: dict[str, float] = {}
        for name, generator in GENERATORS.items():
            if name == "blockwise":  # it is for ZeRO-3, and stands below
                continue
            chunks = generator.chunks[0]
            costs = whole if chunks == 1 else half
            schedule = make_schedule(name, Shape(ranks, chunks, micro_batches))
            if max(peak_activations(actions, costs) for actions in schedule.ranks) > times * ranks:
                continue
            for wait in (True, False):
                rows[name + ("" if wait else ", unsynchronised")] = gain(base, schedule, costs, wait)
        for wait in (True, False):
            for chunks, costs in ((1, whole), (2, half)):
                found = find_schedule(Shape(ranks, chunks, micro_batches), costs, times * ranks, wait, seconds=4.0)
                rows[f"auto, {chunks} chunks" + ("" if wait else ", unsynchronised")] = 100 * (base / found.seconds - 1)
        gains[f"{times} x memory"] = rows
    return gains


def gain(base: float, schedule: Any, costs: Costs, wait: bool, gathering: Gathering = "none") -> float:
    """Percent more steps in a second than with a step of `base`."""
    return 100 * (base / period(schedule, costs, wait, gathering)[0] - 1)


def over_breadth_first(ranks: int, micro_batches: int, ratio: tuple[float, float, float]) -> dict[str, float]:
    """Chunks -> gain in percent of blockwise (units as large as ranks) over breadth-first, weights gathered for every run
    of one chunk by both: with breadth-first in rounds of a unit, which hold no more, and in one round of all
    micro-batches, which holds so many times more."""
    rows = {}
    for chunks in (2, 4):
        costs = uniform_costs(ranks * chunks, *ratio, send=0.03, gather=GATHER * ratio[0])
        shape = Shape(ranks, chunks, micro_batches, ranks)
        ours, at_once = make_schedule("blockwise", shape), make_schedule("gpipe", shape)
        one_round, _ = period(make_schedule("gpipe", Shape(ranks, chunks, ranks)), costs, gathering="run")
        held = [max(peak_activations(actions, costs) for actions in s.ranks) for s in (ours, at_once)]
        rows[f"{chunks} chunks, in rounds"] = gain(one_round * micro_batches / ranks, ours, costs, True, "run")
        rows[f"{chunks} chunks, in one"] = gain(period(at_once, costs, gathering="run")[0], ours, costs, True, "run")
        rows[f"{chunks} chunks, held by one round / blockwise"] = held[1] / held[0]
    return rows


def run(on_ranks: Callable[..., Any]) -> dict[str, Any]:
    """Everything, by size and ratio."""
    return {
        f"{ranks} ranks, {micro_batches} micro-batches, {name}": {
            "over 1f1b": over_1f1b(ranks, micro_batches, ratio),
            "blockwise over breadth-first": over_breadth_first(ranks, micro_batches, ratio),
        }
        for ranks, micro_batches in SIZES
        for name, ratio in RATIOS.items()
    }


def show(found: dict[str, Any]) -> str:
    lines = []
    for size, parts in found.items():
        lines.append(size)
        for limit, rows in parts["over 1f1b"].items():
            best = sorted(rows.items(), key=lambda row: -row[1])[:6]
            lines.append(f"  {limit}: " + "; ".join(f"{name} {percent:+.1f} %" for name, percent in best))
        rows = parts["blockwise over breadth-first"]
        lines.append(
            "  blockwise over breadth-first: " + "; ".join(f"{name} {value:.1f}" for name, value in rows.items())
        )
    return "\n".join(lines)
