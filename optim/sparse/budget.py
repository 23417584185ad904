"""How many weights are kept: of which matrix, and when. Pure numbers; the same on every layout.

Density of a matrix (m, n) with `density` d of all weights:

    uniform   d
    er        min(1, e (m + n) / (m n))       (Mocanu et al., *Scalable Training of ANNs with Adaptive Sparse Connectivity*)
    erk       the same with the kernel's dims (Evci et al., *Rigging the Lottery*); a matrix has none, so it is er

with e such that the whole keeps d. Of the weights in all, exactly round(d x size) are kept.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch


def densities(shapes: Sequence[torch.Size], density: Fraction, distribution: str) -> list[Fraction]:
    """Returns the density of every matrix."""
    if distribution == "uniform":
        return [density] * len(shapes)
    raw = [Fraction(sum(shape), shape.numel()) for shape in shapes]
    full: set[int] = set()
    while True:
        # What is full already keeps all that it has; the others share the rest.
        rest = density * sum(s.numel() for s in shapes) - sum(shapes[i].numel() for i in full)
        shared = sum(r * s.numel() for i, (r, s) in enumerate(zip(raw, shapes, strict=True)) if i not in full)
        scale = rest / shared if shared else Fraction(0)
        over = {i for i, r in enumerate(raw) if i not in full and r * scale > 1}
        if not over:
            return [Fraction(1) if i in full else r * scale for i, r in enumerate(raw)]
        full |= over


def budgets(shapes: Sequence[torch.Size], density: float, distribution: str) -> list[int]:
    """Says how many weights of every matrix are kept, together exactly round(density x size). `global` shares as `uniform`
    does before matrices compete. In fractions of the decimal that was given: 0.1 of 30 is 3, and no float's noise says
    who is first among equals."""
    exact, distribution = Fraction(str(density)), "uniform" if distribution == "global" else distribution
    wanted = [d * s.numel() for d, s in zip(densities(shapes, exact, distribution), shapes, strict=True)]
    total = round(exact * sum(s.numel() for s in shapes))
    return share_out(total, wanted, [s.numel() for s in shapes])


def share_out(total: int, wanted: Sequence[Fraction], room: Sequence[int]) -> list[int]:
    """Returns whole numbers near `wanted`, none above its `room`, that add up to `total`: rounded down, and what is left to the
    largest remainders, the first of equals first."""
    shares = [min(math.floor(w), r) for w, r in zip(wanted, room, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: (shares[i] - wanted[i], i))
    while (left := total - sum(shares)) > 0:
        free = [i for i in order if shares[i] < room[i]]
        if not free:
            raise ValueError(f"{total} do not fit into {sum(room)}")
        for i in free[:left]:
            shares[i] += 1
    return shares


def row_budgets(shapes: Sequence[torch.Size], density: float) -> list[int]:
    """Says how many rows of every matrix are kept: the density of each, together exactly round(density x rows)."""
    return budgets([torch.Size((rows, 1)) for rows, _ in shapes], density, "uniform")


def share_replaced(step: int, first: float, stop: int) -> float:
    """Returns the share of a mask that the update after step t replaces: first / 2 (1 + cos(pi t / T_end))."""
    return first / 2 * (1 + math.cos(math.pi * min(1.0, step / stop)))


def gradual_density(step: int, density: float, start: int, stop: int) -> float:
    """Returns d + (1 - d) (1 - (t - t_0) / (T - t_0))^3 (Zhu & Gupta, *To Prune, or Not to Prune*): 1 until `start`, `density` from
    `stop` on."""
    if step >= stop:
        return density
    left = 1 - max(0, step - start) / (stop - start)
    return density + (1 - density) * left**3


def fallen(step: int, sizes: Sequence[int], kept: Sequence[int], start: int, stop: int) -> list[int]:
    """Returns n - (n - k) (t - t_0) / (T - t_0) of every n that ends with k (Cho et al., *PDP*: epsilon of the way an epoch): all
    until `start`, k from `stop` on."""
    way = Fraction(1) if step >= stop else Fraction(max(0, step - start), stop - start)
    wanted = [n - way * (n - k) for n, k in zip(sizes, kept, strict=True)]
    return share_out(round(sum(wanted)), wanted, sizes)


def is_due(step: int, every: int, start: int, stop: int) -> bool:
    """Says whether masks change after step t: every so many steps from `start` on, and at `stop`."""
    return start <= step <= stop and ((step - start) % every == 0 or step == stop)
