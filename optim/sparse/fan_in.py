"""Masks with as many weights in every row (Lasby et al., *Dynamic Sparse Training with Structured Sparsity*, SRigL).

Of a matrix with A active weights in rows of fan-in k, an update that replaces K = round(share A) of them:

    1. finds what is salient: the A - K largest active |w| and the K largest |g| of inactive weights, of the whole matrix;
    2. leaves out (ablates) rows with fewer than gamma k salient weights, and takes in others again that have as many;
    3. sets k' = floor(budget / rows that live), at most the columns;
    4. gives every living row k' weights: of those that stayed the largest |w|, then inactive ones by |g|, then what was
       dropped, again by |w|.

The number of non-zeros is exactly k' x living rows: below the budget by less than the living rows, or by more where they
are so few that all their columns are not enough. A row is whole on one rank, so beside the selection of step 1 only the
numbers of living rows cross ranks: one for each matrix.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rowwise.optim.select import Keys, key_bits, magnitude_keys
from rowwise.optim.sparse.evolve import at_random, inactive_gradients, kept_and_grown, magnitudes
from rowwise.optim.sparse.layers import Layer, Layers, candidates
from rowwise.optim.sparse.masks import join, pack, portions, unpack


def fan_in_of(budget: int, rows: int, columns: int) -> int:
    """Weights of each of so many rows."""
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
    """The masks after an update. `gradients`: this rank's rows of the dense ones, by name."""
    bits = key_bits(layers.dtype)
    kept, grown = kept_and_grown(layers, share, lambda layer: inactive_gradients(layer, gradients[layer.name]), bits)
    active = [_row_counts(layer.bits, layer.columns) > 0 for layer in layers.mine]
    before = _count_rows(layers, active)
    alive = []
    for layer, keep, new in zip(layers.mine, kept, grown, strict=True):
        salient = _row_counts(keep, layer.columns) + _row_counts(new, layer.columns)
        alive.append(salient >= gamma * fan_in_of(budgets[layer.index], before[layer.index], layer.columns))
    living = _count_rows(layers, alive)
    masks = []
    for layer, keep, rows, old in zip(layers.mine, kept, alive, active, strict=True):
        # Where no row has enough, there is no reason to leave out one rather than another.
        rows, count = (rows, living[layer.index]) if living[layer.index] else (old, before[layer.index])
        fan_in = fan_in_of(budgets[layer.index], count, layer.columns)
        masks.append(_filled(layer, keep, gradients[layer.name], rows, fan_in))
    return masks


def _filled(layer: Layer, keep: Tensor, gradient: Tensor, alive: Tensor, fan_in: int) -> Tensor:
    """`fan_in` weights in each row that is alive, none in the others."""
    masks = []
    for rows, active in portions(layer.bits, layer.columns):
        stays = unpack(keep[rows], layer.columns)
        strength = torch.where(active, magnitude_keys(layer.weight[rows]), magnitude_keys(gradient[rows]))
        rank = torch.where(stays, 2, torch.where(active, 0, 1))
        mask = first_of(by_rank(rank, strength), fan_in)
        masks.append(pack(mask & alive[rows, None]))
    return join(masks, layer.columns, layer.bits.device)


def by_rank(rank: Tensor, strength: Tensor) -> Tensor:
    """The columns of every row, the highest rank first, of equals the greatest strength, of equals the first column."""
    by_strength = strength.sort(dim=1, descending=True, stable=True).indices
    order = rank.gather(1, by_strength).sort(dim=1, descending=True, stable=True).indices
    return by_strength.gather(1, order)


def first_of(order: Tensor, k: int) -> Tensor:
    """A mask of the first k columns of each row's order."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :k], True)


def _row_counts(packed: Tensor, columns: int) -> Tensor:
    parts = [mask.sum(1) for _, mask in portions(packed, columns)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=packed.device)


def _count_rows(layers: Layers, rows: Sequence[Tensor]) -> list[int]:
    """How many of every matrix's rows, over all ranks."""
    counts = layers.zeros()
    for layer, flags in zip(layers.mine, rows, strict=True):
        counts[layer.index] = flags.sum()
    return layers.sum(counts, layers.rows)
