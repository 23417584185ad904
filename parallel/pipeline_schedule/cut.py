"""Cuts a model into stages of nearly equal cost."""

import itertools
from collections.abc import Sequence


def check_stages(layers: int, stages: int) -> None:
    """Refuses more stages than layers. Raises ValueError."""
    if stages > layers:
        raise ValueError(
            f"{stages} pipeline stages (parallel.pipeline x parallel.virtual_stages) and model.layers={layers}: "
            f"a stage has at least one layer; give at most {layers} stages"
        )


def balance(first: float, layers: Sequence[float], last: float, stages: int) -> list[range]:
    """Chooses the layers of each stage, contiguous and at least one each, such that the dearest stage is as cheap as can be, and
    among those cuts the one whose costs have the smallest sum of squares.

    `first` is what comes before the layers (the embedding), `last` what comes after (norm, head and loss). Raises
    ValueError for more stages than layers.
    """
    check_stages(len(layers), stages)
    sums = [first]
    for layer in layers:
        sums.append(sums[-1] + layer)
    sums[0] = 0.0
    sums[-1] += last
    # best[n]: of the first n layers in the stages so far, (dearest, sum of squares, where each stage begins). The first
    # round finds how cheap the dearest can be; in the second, cuts differ by their squares alone up to there.
    dearest = 0.0
    for _ in range(2):
        best: list[tuple[float, float, tuple[int, ...]]] = [
            (max(dearest, sums[n]), sums[n] ** 2, (0,)) if n else (float("inf"), float("inf"), ())
            for n in range(len(layers) + 1)
        ]
        for stage in range(1, stages):
            best = [
                min(
                    (
                        (max(best[k][0], cost), best[k][1] + cost**2, (*best[k][2], k))
                        for k in range(stage, n)
                        for cost in [sums[n] - sums[k]]
                    ),
                    default=(float("inf"), float("inf"), ()),
                )
                for n in range(len(layers) + 1)
            ]
        dearest = best[-1][0]
    begins = [*best[-1][2], len(layers)]
    return [range(a, b) for a, b in itertools.pairwise(begins)]
