"""Dense weights behind the ones that compute: `st3` and `pdp`.

    st3    w' = c mask sign(w) max(|w| - l, 0)      dL/dw = dL/dw'              (Vanderschueren & De Vleeschouwer, *Are
           Straight-Through Gradients and Soft-Thresholding All You Need for Sparse Training?*)
           c = 1.01 / (r + 0.01) for each row, r the share of its |w| that the mask has; 1 with `rescale=false`
    pdp    w' = z w,  z = 1 / (1 + exp((t^2 - w^2) / tau))                      (Cho et al., *PDP: Parameter-free
           dL/dw = dL/dw' (z + 2 w^2 z (1 - z) / tau)                            Differentiable Pruning*)

with k weights to be kept (the density is cooled, see `optim.sparse.budget`): l the largest |w| below the k-th largest, and
t halfway between the two. Both rules look at single rows but for these two numbers, which are found exactly over all ranks.
`p` holds w', so that every forward, evaluation and export computes with it; the dense w is one more state, split
like it (bytes: those of the parameters), which takes its place while the optimizer steps.

pdp's masks are soft until `stop_at`; from there on they are 0 and 1 and stay. st3's mask follows the weights to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowwise.kernels.portions import device_portions
from rowwise.kernels.rows import local
from rowwise.optim.select import Problem, key_bits, magnitude_of, next_below, select
from rowwise.optim.shell import Optimizer
from rowwise.optim.sparse.account import Account, begin_account, take_account
from rowwise.optim.sparse.budget import budgets, cooled_density
from rowwise.optim.sparse.config import PDP, ST3, stop_step
from rowwise.optim.sparse.evolve import magnitudes
from rowwise.optim.sparse.layers import Layer, Layers, candidates
from rowwise.optim.sparse.masks import portions, unpack, zero_outside_

STEADY, TINY = 0.01, 1e-6  # as the authors' code has them
EVERYTHING = -1.0  # the threshold while every weight is kept


def soft_threshold(w: Tensor, threshold: float, mask: Tensor, rescale: bool) -> Tensor:
    """c mask sign(w) max(|w| - l, 0) of whole rows; c = 1 without `rescale`. At least in float32."""
    wide = w if w.dtype == torch.float64 else w.float()
    soft = (wide.sign() * (wide.abs() - threshold).clamp_min(0)).masked_fill(~mask, 0)
    if not rescale:
        return soft
    kept, whole = ((wide.abs() * part).mean(1, keepdim=True) + TINY for part in (mask, 1))
    return soft * ((1 + STEADY) / (kept / whole + STEADY))


def soft_mask(w: Tensor, threshold: float, temperature: float) -> Tensor:
    """z = 1 / (1 + exp((t^2 - w^2) / tau)), at least in float32."""
    wide = w if w.dtype == torch.float64 else w.float()
    return torch.sigmoid((wide.square() - threshold**2) / temperature)


def soft_mask_slope(w: Tensor, threshold: float, temperature: float) -> Tensor:
    """d(z w) / dw = z + 2 w^2 z (1 - z) / tau."""
    z = soft_mask(w, threshold, temperature)
    wide = w.to(z.dtype)
    return z + 2 * wide.square() * z * (1 - z) / temperature


@dataclass
class Cooled:
    """The dense weights, masks and thresholds of a run under one of those rules. `steps`: of the run."""

    config: ST3 | PDP
    layers: Layers
    steps: int
    account: Account | None = None
    density: float = 1.0

    def __post_init__(self) -> None:
        self._dense = {layer.name: layer.p.detach().clone() for layer in self.layers.mine}
        self._thresholds = {
            layer.name: torch.full((1,), EVERYTHING, dtype=torch.float64)  # on the host, which looks at it
            for layer in self.layers.mine
        }

    def named_state(self) -> dict[str, Tensor]:
        return (
            self.layers.named_masks()
            | {f"{name}.dense": w for name, w in self._dense.items()}
            | {f"{name}.threshold": t for name, t in self._thresholds.items()}
        )

    @torch.no_grad()
    def filter_gradients(self, step: int) -> None:
        """After the backward of step t, before the norm of its gradients: from those of w' to those of w."""
        if isinstance(self.config, ST3):
            return
        for layer in self.layers.mine:
            gradient, threshold = layer.gradient(), self._thresholds[layer.name].item()
            if self._is_hard(step):
                zero_outside_(gradient, layer.bits)
            elif threshold != EVERYTHING:
                w = local(self._dense[layer.name])
                for rows in device_portions(w, layer.columns):
                    gradient[rows] *= soft_mask_slope(w[rows], threshold, self.config.temperature)

    @torch.no_grad()
    def step(self, optimizer: Optimizer, step: int, usable: bool) -> None:
        """The optimizer's step t on the dense weights, unless its gradients are not `usable`; then the thresholds of the
        density that step t has, and w' anew."""
        self.account, stop = None, stop_step(self.config, self.steps)
        counts = self._counts(step)
        self.density = sum(counts) / self.layers.size
        if self._is_hard(step):
            if usable:
                optimizer.step()
                for layer in self.layers.mine:
                    zero_outside_(layer.weight, layer.bits)
                    local(self._dense[layer.name]).copy_(layer.weight)
            return
        if usable:
            for layer in self.layers.mine:
                layer.weight.copy_(local(self._dense[layer.name]))
            optimizer.step()
            for layer in self.layers.mine:
                local(self._dense[layer.name]).copy_(layer.weight)
        if step == self._last_cut(step):
            self._cut(counts)
        for layer in self.layers.mine:
            self._compute(layer)
        if self._is_hard(step + 1):
            self._harden(optimizer)
        if step == stop:
            begin_account(self.layers)
        if step % self.config.account_every == 0 or step == stop:
            self.account = take_account(self.layers)

    def _is_hard(self, step: int) -> bool:
        """Whether step t finds masks of 0 and 1 that stay."""
        return isinstance(self.config, PDP) and step > stop_step(self.config, self.steps)

    def _last_cut(self, step: int) -> int | None:
        """The last step up to t after which thresholds are found: every so many from the start, and where the density
        arrives; None before the first."""
        start, every, stop = self.config.start_at, self.config.update_every, stop_step(self.config, self.steps)
        if step < start:
            return None
        regular = start + (step - start) // every * every
        return max(regular, stop) if step >= stop else regular

    def _counts(self, step: int) -> list[int]:
        """How many weights of every matrix are kept after step t; `global`: all of them together as many as all of these."""
        shapes, config, cut = self.layers.shapes, self.config, self._last_cut(step)
        if cut is None:
            return [shape.numel() for shape in shapes]
        density = cooled_density(cut, config.density, config.start_at, stop_step(config, self.steps))
        return budgets(shapes, density, config.distribution)

    def _cut(self, counts: Sequence[int]) -> None:
        weights = [local(self._dense[layer.name]) for layer in self.layers.mine]
        together = self.config.distribution == "global"
        cuts = cut_by_size(self.layers, weights, counts, together)
        for layer, (mask, kept, dropped) in zip(self.layers.mine, cuts, strict=True):
            layer.bits.copy_(mask)
            threshold = dropped if isinstance(self.config, ST3) else (kept + dropped) / 2
            self._thresholds[layer.name].fill_(threshold)

    def _compute(self, layer: Layer) -> None:
        """w' of w."""
        dense, threshold = local(self._dense[layer.name]), self._thresholds[layer.name].item()
        for rows in device_portions(dense, layer.columns):
            w = dense[rows]
            if threshold != EVERYTHING:
                w = self._sparse(w, threshold, unpack(layer.bits[rows], layer.columns))
            layer.weight[rows] = w.to(dense.dtype)

    def _sparse(self, w: Tensor, threshold: float, mask: Tensor) -> Tensor:
        if isinstance(self.config, ST3):
            return soft_threshold(w, threshold, mask, self.config.rescale)
        return w * soft_mask(w, threshold, self.config.temperature)

    def _harden(self, optimizer: Optimizer) -> None:
        for layer in self.layers.mine:
            layer.weight.copy_(local(self._dense[layer.name]))
            zero_outside_(layer.weight, layer.bits)
            for rows, mask in portions(layer.bits, layer.columns):
                optimizer.clear_(layer.p, rows, ~mask)


def cut_by_size(
    layers: Layers, weights: Sequence[Tensor], counts: Sequence[int], together: bool
) -> list[tuple[Tensor, float, float]]:
    """Of every matrix of this rank: the mask of the k largest |w|, the k-th largest, and the largest below it (0 where
    there is none; EVERYTHING for both where all are kept). All matrices `together` keep as many as all counts."""
    parts = [candidates(layer, magnitudes(w)) for layer, w in zip(layers.mine, weights, strict=True)]
    if together:
        pools, ks, sizes, groups = [parts], [sum(counts)], [layers.size], layers.model
    else:
        pools, groups = [[part] for part in parts], layers.rows
        ks = [counts[layer.index] for layer in layers.mine]
        sizes = [layers.shapes[layer.index].numel() for layer in layers.mine]
    problems = [Problem(k, layers.size, pool) for k, pool in zip(ks, pools, strict=True)]
    cuts = select(problems, key_bits(layers.dtype), groups, layers.device)
    below = next_below(problems, cuts, groups, layers.device)
    results = []
    for i, part in enumerate(parts):
        pool = 0 if together else i
        kept, dropped = (magnitude_of(max(0, bits), layers.dtype) for bits in (cuts[pool].bits, below[pool]))
        whole = ks[pool] == sizes[pool]
        results.append((layers.taken(part, cuts[pool]), *((EVERYTHING, EVERYTHING) if whole else (kept, dropped))))
    return results
