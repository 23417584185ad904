"""Masks with as many weights in every row (Lasby et al., *Dynamic Sparse Training with Structured Sparsity*, SRigL), as
its authors' code has them (calgaryml/condensed-sparsity, `RigLConstFanScheduler`).

Of a matrix (r, n) with a budget of B and A active weights, an update that replaces K = floor(share A) of them:

    1. finds what is salient: the A - K largest active |w|, and the K largest |g| of all weights, active ones too;
    2. leaves out (ablates) rows with fewer than max(1, floor(gamma k)) salient weights, where k = floor(B / r) is the fan-in
       before any ablation, and takes in others again that have as many. Where fewer than floor(B / n) + 1 rows would live,
       which could not hold the budget, the bound falls until as many do;
    3. sets k' = floor(B / rows that live), at most the columns;
    4. gives every living row k' weights: of the A - K largest active |w| of living rows its largest, then others by |g|,
       those that it just lost among them, which then keep their value.

The number of non-zeros is exactly k' x living rows: below the budget by less than the living rows. A row is whole on one
rank, so beside the selections of steps 1 and 4 what crosses ranks is how many rows have 0, 1, ... salient weights up to the
bound, and two counts: bound + 3 numbers for each matrix.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rowwise.optim.select import Keys, key_bits, magnitude_keys
from rowwise.optim.sparse.evolve import active_magnitudes, at_random, magnitudes
from rowwise.optim.sparse.layers import Layer, Layers, candidates
from rowwise.optim.sparse.masks import join, pack, portions


def fan_in_of(budget: int, rows: int, columns: int) -> int:
    """Counts the weights of each of so many rows."""
    return min(columns, budget // max(1, rows))


def random_fan_in(layers: Layers, budgets: Sequence[int], seed: int) -> list[Tensor]:
    """Masks of equal rows, at random. Communicates nothing."""
    return [_rows_of(layer, at_random(layer, seed, "start"), _whole(layers, layer, budgets)) for layer in layers.mine]


def largest_fan_in(layers: Layers, budgets: Sequence[int]) -> list[Tensor]:
    """Masks of the largest |w| of every row. Communicates nothing."""
    return [_rows_of(layer, magnitudes(layer.weight), _whole(layers, layer, budgets)) for layer in layers.mine]


def _whole(layers: Layers, layer: Layer, budgets: Sequence[int]) -> int:
    rows, columns = layers.shapes[layer.index]
    return fan_in_of(budgets[layer.index], rows, columns)


def _rows_of(layer: Layer, keys: Keys, fan_in: int) -> Tensor:
    masks = [pack(first_of(chosen.sort(dim=1, descending=True, stable=True).indices, fan_in))
             for _, chosen in candidates(layer, keys).portions()]  # fmt: skip
    return join(masks, layer.columns, layer.bits.device)


def evolve_fan_in(
    layers: Layers, budgets: Sequence[int], share: float, gradients: Mapping[str, Tensor], gamma: float
) -> list[Tensor]:
    """Returns the masks after an update. `gradients`: this rank's rows of the dense ones, by name."""
    bits = key_bits(layers.dtype)
    active = layers.counts([layer.bits for layer in layers.mine], layers.rows)
    grown = [int(share * active[layer.index]) for layer in layers.mine]
    kept = [active[layer.index] - k for layer, k in zip(layers.mine, grown, strict=True)]
    by_size = [active_magnitudes(layer) for layer in layers.mine]
    by_gradient = [magnitudes(gradients[layer.name]) for layer in layers.mine]
    chosen = layers.choose(by_size + by_gradient, kept + grown, bits)
    salient = [
        _row_counts(keep | new, layer.columns)
        for layer, keep, new in zip(layers.mine, chosen, chosen[len(layers.mine) :], strict=False)
    ]
    alive, living = living_rows(layers, budgets, salient, gamma)
    left = layers.counts(
        [layer.bits * rows[:, None] for layer, rows in zip(layers.mine, alive, strict=True)], layers.rows
    )
    stays = layers.choose(
        [of_rows(keys, rows) for keys, rows in zip(by_size, alive, strict=True)],
        [min(k, left[layer.index]) for layer, k in zip(layers.mine, kept, strict=True)],
        bits,
    )
    return [
        _filled(
            layer,
            keep,
            gradients[layer.name],
            rows,
            fan_in_of(budgets[layer.index], living[layer.index], layer.columns),
        )
        for layer, keep, rows in zip(layers.mine, stays, alive, strict=True)
    ]


def living_rows(
    layers: Layers, budgets: Sequence[int], salient: Sequence[Tensor], gamma: float
) -> tuple[list[Tensor], list[int]]:
    """Says which rows of this rank's matrices live, by their numbers of salient weights, and how many do of every matrix."""
    bounds = [least_salient(gamma, fan_in_of(k, *shape)) for k, shape in zip(budgets, layers.shapes, strict=True)]
    histogram = layers.zeros(max(bounds) + 1)
    for layer, counts in zip(layers.mine, salient, strict=True):
        histogram[layer.index] = torch.bincount(counts.clamp_max(bounds[layer.index]), minlength=histogram.size(1))
    rows_with = layers.sum(histogram.flip(1).cumsum(1).flip(1), layers.rows)  # so many salient weights or more
    living = [0] * len(layers.names)
    for layer in layers.mine:
        index, (rows, columns) = layer.index, layers.shapes[layer.index]
        fewest = min(rows, budgets[index] // columns + 1)
        bounds[index] = max(c for c in range(bounds[index] + 1) if rows_with[index][c] >= fewest)
        living[index] = rows_with[index][bounds[index]]
    return [counts >= bounds[layer.index] for layer, counts in zip(layers.mine, salient, strict=True)], living


def least_salient(gamma: float, fan_in: int) -> int:
    """Says how many salient weights a row needs to live; 0 asks for nothing."""
    return max(1, int(gamma * fan_in)) if gamma else 0


def of_rows(keys: Keys, alive: Tensor) -> Keys:
    """Returns `keys` with no candidate in other rows than those that are `alive`."""
    return lambda rows: keys(rows).masked_fill_(~alive[rows, None], -1)


def _filled(layer: Layer, keep: Tensor, gradient: Tensor, alive: Tensor, fan_in: int) -> Tensor:
    """`fan_in` weights in each row that is alive, none in the others."""
    masks = []
    for rows, stays in portions(keep, layer.columns):
        strength = torch.where(stays, magnitude_keys(layer.weight[rows]), magnitude_keys(gradient[rows]))
        mask = first_of(by_rank(stays.byte(), strength), fan_in)
        masks.append(pack(mask & alive[rows, None]))
    return join(masks, layer.columns, layer.bits.device)


def by_rank(rank: Tensor, strength: Tensor) -> Tensor:
    """Returns the columns of every row, the highest rank first, of equals the greatest strength, of equals the first column."""
    by_strength = strength.sort(dim=1, descending=True, stable=True).indices
    order = rank.gather(1, by_strength).sort(dim=1, descending=True, stable=True).indices
    return by_strength.gather(1, order)


def first_of(order: Tensor, k: int) -> Tensor:
    """Returns a mask of the first k columns of each row's order."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :k], True)


def _row_counts(packed: Tensor, columns: int) -> Tensor:
    parts = [mask.sum(1) for _, mask in portions(packed, columns)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=packed.device)
