"""Dense weights behind the ones that compute: `st3`, and `pdp` for single weights, n of m neighbours or whole rows; what
they compute is in `optim.sparse.soft`.

`p` holds w', so that every forward, evaluation and export computes with it; the dense w is one more state, split
like it (bytes: those of the parameters), which takes its place while the optimizer steps.

With k weights or rows to be kept, st3's l is the largest |w| below the k-th largest, and pdp's t is halfway between the two:
numbers that are found exactly over all ranks; all else looks at single rows. How k falls is told in `optim.sparse.budget`:
st3's density with a cube, all matrices competing at every step; of pdp each matrix has its own end, fixed at the first step,
where all compete once, and goes there along a line. Groups keep n of m from the first step on.

pdp's masks are soft until the last step; from there on they are 0 and 1 and stay. st3's mask follows the weights to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowwise.kernels.nm import nm_mask
from rowwise.kernels.portions import device_portions
from rowwise.kernels.rows import local
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.select import Candidates, Cut, Groups, Problem, key_bits, magnitude_of, next_below, select
from rowwise.optim.sparse.account import Account, begin_account, take_account
from rowwise.optim.sparse.budget import budgets, fallen, gradual_density, row_budgets
from rowwise.optim.sparse.config import PDP, ST3, PDPBase, PDPGroups, PDPRows, every
from rowwise.optim.sparse.evolve import magnitudes
from rowwise.optim.sparse.layers import Layer, Layers, candidates
from rowwise.optim.sparse.masks import fill_, pack, portions, unpack, zero_outside_
from rowwise.optim.sparse.soft import (
    group_thresholds,
    row_norms,
    soft_mask,
    soft_mask_slope,
    soft_row_mask,
    soft_threshold,
    through_row_mask,
)

EVERYTHING = -1.0  # the threshold while every weight is kept
UNDECIDED = -1  # how much of a matrix is kept at the end, before that is fixed


@dataclass
class St3Pdp:
    """The dense weights, masks and thresholds of a run under one of those rules. `steps`: of the run."""

    config: ST3 | PDP | PDPRows | PDPGroups
    layers: Layers
    steps: int
    account: Account | None = None
    density: float = 1.0

    def __post_init__(self) -> None:
        mine = self.layers.mine
        self._start, self._stop = self.config.first_step(self.steps), self.config.last_step(self.steps)
        self._dense = {layer.name: layer.p.detach().clone() for layer in mine}
        # On the host, which looks at them.
        self._thresholds = {layer.name: torch.full((1,), EVERYTHING, dtype=torch.float64) for layer in mine}
        self._ends = {layer.name: torch.full((1,), UNDECIDED) for layer in mine} if self._has_ends else {}
        self._all_ends: list[int] | None = None

    @property
    def _has_ends(self) -> bool:
        return isinstance(self.config, PDP) and self.config.distribution == "global"

    def named_state(self) -> dict[str, Tensor]:
        return (
            self.layers.named_masks()
            | {f"{name}.dense": w for name, w in self._dense.items()}
            | {f"{name}.threshold": t for name, t in self._thresholds.items()}
            | {f"{name}.end": k for name, k in self._ends.items()}
        )

    @torch.no_grad()
    def filter_gradients(self, step: int) -> None:
        """Passes from the gradients of w' to those of w, after the backward of step t and before their norm."""
        if isinstance(self.config, ST3):
            return
        for layer in self.layers.mine:
            gradient, threshold = layer.gradient(), self._thresholds[layer.name].item()
            if self._is_hard(step):
                zero_outside_(gradient, layer.bits)
            elif threshold != EVERYTHING:
                w = local(self._dense[layer.name])
                for rows in device_portions(w, layer.columns):
                    gradient[rows] = self._gradient(gradient[rows], w[rows], threshold).to(gradient.dtype)

    @torch.no_grad()
    def step(self, optimizer: Optimizer, step: int, usable: bool) -> None:
        """Makes the optimizer's step t on the dense weights, unless its gradients are not `usable`; then the thresholds of the
        density that step t has, and w' anew."""
        self.account = None
        if self._is_hard(step):
            if usable:
                optimizer.step()
                for layer in self.layers.mine:
                    zero_outside_(layer.weight, layer.bits)
                    local(self._dense[layer.name]).copy_(layer.weight)
            self.density = self._density_after(step)
            return
        if usable:
            for layer in self.layers.mine:
                layer.weight.copy_(local(self._dense[layer.name]))
            optimizer.step()
            for layer in self.layers.mine:
                local(self._dense[layer.name]).copy_(layer.weight)
        if step == self._last_cut(step):
            self._cut(step)
        self.density = self._density_after(step)
        for layer in self.layers.mine:
            self._compute(layer)
        if self._is_hard(step + 1):
            self._harden(optimizer)
        if step == self._stop:
            begin_account(self.layers)
        if step % self.config.account_every == 0 or step == self._stop:
            self.account = take_account(self.layers)

    def _is_hard(self, step: int) -> bool:
        """Whether step t finds masks of 0 and 1 that stay."""
        return isinstance(self.config, PDPBase) and step > self._stop

    def _last_cut(self, step: int) -> int | None:
        """The last step up to t after which thresholds are found: every so many from the start, and where the density
        arrives; None before the first."""
        if step < self._start:
            return None
        gap = 1 if isinstance(self.config, PDPGroups) else every(self.config.update_every, self.steps)
        regular = self._start + (step - self._start) // gap * gap
        return max(regular, self._stop) if step >= self._stop else regular

    def _density_after(self, step: int) -> float:
        """The share of all weights that masks keep after step t."""
        cut = self._last_cut(step)
        if cut is None or cut == 0:
            return 1.0
        counts = self._counts(cut)
        if isinstance(self.config, PDPRows):
            counts = [k * shape[1] for k, shape in zip(counts, self.layers.shapes, strict=True)]
        return sum(counts) / self.layers.size

    def _counts(self, step: int) -> list[int]:
        """How many weights (or rows) of every matrix are kept by the cut after step t; of st3's `global`, all of them
        together as many as all of these."""
        config, shapes, times = self.config, self.layers.shapes, (self._start, self._stop)
        sizes = [shape.numel() for shape in shapes]
        if isinstance(config, ST3):
            return budgets(shapes, gradual_density(step, config.density, *times), config.distribution)
        if isinstance(config, PDPGroups):
            return [size * config.n // config.m for size in sizes]
        if isinstance(config, PDPRows):
            return fallen(step, [rows for rows, _ in shapes], row_budgets(shapes, config.density), *times)
        return fallen(step, sizes, self._ends_of_all(config), *times)

    def _ends_of_all(self, config: PDP) -> list[int]:
        """How many weights of every matrix are kept at the end: those of the largest of all when this was first asked, in
        this run or before it was resumed. Communicates then, or over the stages."""
        if not self._has_ends:
            return budgets(self.layers.shapes, config.density, config.distribution)
        if self._all_ends is None:
            mine, ends = self.layers.mine, self.layers.zeros()
            known = [int(self._ends[layer.name].item()) for layer in mine]
            for layer, end in zip(mine, known, strict=True):
                ends[layer.index] = end
            found = self.layers.sum(ends, self.layers.stages)
            if UNDECIDED in found:
                found = self._compete(config)
                for layer in mine:
                    self._ends[layer.name].fill_(found[layer.index])
            self._all_ends = found
        return self._all_ends

    def _compete(self, config: PDP) -> list[int]:
        """How many of the largest of all dense weights every matrix has."""
        keys = [magnitudes(local(self._dense[layer.name])) for layer in self.layers.mine]
        k = sum(budgets(self.layers.shapes, config.density, "uniform"))
        masks = self.layers.choose_together(keys, k, key_bits(self.layers.dtype))
        return self.layers.counts(masks, self.layers.model)

    def _cut(self, step: int) -> None:
        config, layers = self.config, self.layers
        weights = [local(self._dense[layer.name]) for layer in layers.mine]
        if isinstance(config, PDPGroups):
            for layer, w in zip(layers.mine, weights, strict=True):
                for rows in device_portions(w, layer.columns):
                    layer.bits[rows] = pack(nm_mask(w[rows], config.n, config.m))
                self._thresholds[layer.name].fill_(0.0)  # every group has its own
            return
        counts = self._counts(step)
        if isinstance(config, PDPRows):
            cuts = cut_rows_by_norm(layers, weights, counts)
        else:
            together = isinstance(config, ST3) and config.distribution == "global"
            cuts = cut_by_size(layers, weights, counts, together)
        for layer, (mask, kept, dropped) in zip(layers.mine, cuts, strict=True):
            layer.bits.copy_(mask)
            self._thresholds[layer.name].fill_(dropped if isinstance(config, ST3) else (kept + dropped) / 2)

    def _compute(self, layer: Layer) -> None:
        """w' of w."""
        dense, threshold = local(self._dense[layer.name]), self._thresholds[layer.name].item()
        for rows in device_portions(dense, layer.columns):
            w = dense[rows]
            if threshold != EVERYTHING:
                w = self._sparse(w, threshold, unpack(layer.bits[rows], layer.columns))
            layer.weight[rows] = w.to(dense.dtype)

    def _sparse(self, w: Tensor, threshold: float, mask: Tensor) -> Tensor:
        config = self.config
        if isinstance(config, ST3):
            return soft_threshold(w, threshold, mask, config.rescale)
        if isinstance(config, PDPRows):
            return w * soft_row_mask(w, threshold, config.temperature)
        return w * soft_mask(w, self._threshold_of(w, threshold), config.temperature)

    def _gradient(self, gradient: Tensor, w: Tensor, threshold: float) -> Tensor:
        config = self.config
        assert isinstance(config, PDPBase)
        if isinstance(config, PDPRows):
            return through_row_mask(gradient, w, threshold, config.temperature)
        return gradient * soft_mask_slope(w, self._threshold_of(w, threshold), config.temperature)

    def _threshold_of(self, w: Tensor, threshold: float) -> float | Tensor:
        config = self.config
        return group_thresholds(w, config.n, config.m) if isinstance(config, PDPGroups) else threshold

    def _harden(self, optimizer: Optimizer) -> None:
        for layer in self.layers.mine:
            layer.weight.copy_(local(self._dense[layer.name]))
            zero_outside_(layer.weight, layer.bits)
            for rows, mask in portions(layer.bits, layer.columns):
                optimizer.clear_(layer.p, rows, ~mask)


Cuts = list[tuple[Tensor, float, float]]


def cut_by_size(layers: Layers, weights: Sequence[Tensor], counts: Sequence[int], together: bool) -> Cuts:
    """Returns, of every matrix of this rank, the mask of the k largest |w|, the k-th largest, and the largest below it: 0 where
    there is none; both the largest of all where none is kept, both EVERYTHING where all are. All matrices `together` keep
    as many as all counts."""
    parts = [candidates(layer, magnitudes(w)) for layer, w in zip(layers.mine, weights, strict=True)]
    if together:
        found = edges_of(layers, [parts], [(sum(counts), layers.size)], layers.model) * len(parts)
    else:
        ks = [(counts[layer.index], layers.shapes[layer.index].numel()) for layer in layers.mine]
        found = edges_of(layers, [[part] for part in parts], ks, layers.rows)
    return [(layers.taken(part, cut), *edges) for part, (cut, edges) in zip(parts, found, strict=True)]


def cut_rows_by_norm(layers: Layers, weights: Sequence[Tensor], counts: Sequence[int]) -> Cuts:
    """Returns, of every matrix of this rank, the mask of the k rows of largest norm, and the norms beside the cut; a row's mask is
    full or empty."""
    dtype = torch.float64 if layers.dtype == torch.float64 else torch.float32
    parts = []
    for layer, w in zip(layers.mine, weights, strict=True):
        norms = torch.empty(w.size(0), 1, dtype=dtype, device=w.device)
        for rows in device_portions(w, layer.columns):
            norms[rows] = row_norms(w[rows]).to(dtype)
        parts.append(Candidates(norms, layer.row, magnitudes(norms)))
    ks = [(counts[layer.index], layers.shapes[layer.index][0]) for layer in layers.mine]
    found, cuts = edges_of(layers, [[part] for part in parts], ks, layers.rows), []
    for layer, part, (cut, edges) in zip(layers.mine, parts, found, strict=True):
        bits = torch.empty_like(layer.bits)
        fill_(bits, layer.columns)
        for rows, keys in part.portions():
            bits[rows] *= cut.takes(part, rows, keys)
        cuts.append((bits, *edges))
    return cuts


def edges_of(
    layers: Layers, pools: list[list[Candidates]], ks: Sequence[tuple[int, int]], groups: Groups
) -> list[tuple[Cut, tuple[float, float]]]:
    """Returns, of every pool of candidates, where its k largest end, the k-th largest, and the largest below it. `ks`: (k, how many
    candidates there are over all ranks). Communicates over `groups`: see `optim.select`."""
    problems = [Problem(k, layers.size, pool) for (k, _), pool in zip(ks, pools, strict=True)]
    cuts = select(problems, key_bits(layers.dtype), groups, layers.device)
    below = next_below(problems, cuts, groups, layers.device)
    found = []
    for (k, size), cut, under in zip(ks, cuts, below, strict=True):
        dropped = magnitude_of(max(0, under), layers.dtype)
        kept = magnitude_of(cut.bits, layers.dtype) if k else dropped
        found.append((cut, (EVERYTHING, EVERYTHING) if k == size else (kept, dropped)))
    return found
