"""The triplets of AdaLoRA in a run: the penalty that keeps them orthogonal, how much each matters, and which stay (Zhang et al.;
`budget` has the formulas).

    penalty    o / N sum (|A A^T - I| + |B^T B - I|)        over all N matrices A and B, |.| of Frobenius: into gradients alone

Averages of importance are split by rows, as what they are of. What crosses the ranks that split rows: the A of a stage, whole, and
B^T B of each matrix, once a step; the scores of all triplets of a stage where some are chosen. Over the stages of a pipeline go the
counts of an exact selection (`optim.select`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.kernels.rows import local, row_offset
from rowwise.kernels.spec import Specs
from rowwise.kernels.wide import wide, wide_dtype
from rowwise.optim.rule import all_reduce_, laid_like, shard_group
from rowwise.optim.select import Candidates, Problem, key_bits, magnitude_keys, select
from rowwise.trainer.adapters.budget import Budget, move_importance_
from rowwise.trainer.adapters.config import AdaLora
from rowwise.trainer.adapters.specs import adapted_layers

PREFIX = "importance."  # of its tensors in a checkpoint


class Triplet(NamedTuple):
    """Something of each of the three parameters of a layer."""

    a: Tensor
    e: Tensor
    b: Tensor


@dataclass(frozen=True)
class Layer:
    """The triplets of one matrix. `number`: of all that have any; `first`: the logical row of this rank's first of A and E."""

    number: int
    params: Triplet
    avg: Triplet
    unc: Triplet
    first: int

    @property
    def rows(self) -> slice:
        """Those of A and E that this rank has."""
        return slice(self.first, self.first + local(self.params.a).size(0))


class Allocation:
    """The triplets of the layers of `model`, which is the whole or this rank's stages of a model whose parameters are `specs`, in a
    run of `steps`. `stages`: the ranks that hold the other stages."""

    def __init__(self, model: nn.Module, config: AdaLora, specs: Specs, steps: int, stages: dist.ProcessGroup | None):
        self._config, self._groups = config, [] if stages is None else [stages]
        layers, params = adapted_layers(specs, config), dict(model.named_parameters())
        first, last = config.times(steps)
        start, end = (rank * len(layers) for rank in (config.rank, config.target_rank))
        self._budget, self._last = Budget(start, end, first, steps - last, config.every, steps), last
        self._device = next(iter(params.values())).device
        self._layers = dict[str, Layer]()
        for number, layer in enumerate(layers):
            if f"{layer}.lora_e" in params:  # it may be another stage's
                mine = Triplet(*(params[f"{layer}.lora_{key}"] for key in "aeb"))
                avg, unc = (Triplet(*map(_zeros, mine)) for _ in range(2))
                self._layers[layer] = Layer(number, mine, avg, unc, row_offset(mine.a))

    @property
    def triplets(self) -> int:
        """How many there were at first, of all matrices."""
        return self._budget.start

    def named_state(self) -> dict[str, Tensor]:
        """Returns the averages by their names in a checkpoint, each split as its parameter is."""
        return {
            f"{PREFIX}{name}.lora_{key}.{what}": t
            for name, layer in self._layers.items()
            for what, triplet in (("avg", layer.avg), ("unc", layer.unc))
            for key, t in zip("aeb", triplet, strict=True)
        }

    @torch.no_grad()
    def add_penalty_(self, scale: Tensor) -> None:
        """Adds the gradient of the penalty, times `scale`, to the gradients of a step, which are summed over ranks."""
        layers = list(self._layers.values())
        wholes = [_in_place(layer, local(layer.params.a)) for layer in layers]
        grams = [b.T @ b for b in (wide(local(layer.params.b)) for layer in layers)]
        all_reduce_(wholes + grams, self._shards())
        factor = scale * (self._config.orthogonality * 2 / (2 * self._budget.start / self._config.rank))
        for layer, a, gram in zip(layers, wholes, grams, strict=True):
            apart_a, apart_b = _apart(a @ a.T), _apart(gram)
            _add_(layer.params.a, (apart_a[layer.rows] @ a) * factor)
            _add_(layer.params.b, (wide(local(layer.params.b)) @ apart_b) * factor)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Follows the update of step t, counted from 1, whose gradients are still there: moves importance, and where triplets are
        chosen sets those that go to 0. All ranks call it."""
        done, (beta1, beta2) = step - 1, self._config.betas
        if self._budget.learns(done):
            for layer in self._layers.values():
                avg, unc, params = ([local(t) for t in part] for part in (layer.avg, layer.unc, layer.params))
                move_importance_(avg, unc, params, [_gradient(p) for p in layer.params], beta1, beta2)
        count, due = self._budget.at(done)
        if due or done == self._last:
            self._keep(count)

    def _keep(self, count: int) -> None:
        """Sets E to 0 but for the `count` triplets that matter most; of equal ones at the edge all go."""
        if count >= self._budget.start:
            return
        layers, rank = list(self._layers.values()), self._config.rank
        scores = [_scores(layer) for layer in layers]
        all_reduce_(scores, self._shards())
        rows = [s.view(1, -1) for s in scores]
        candidates = [
            Candidates(row, layer.number * rank, lambda some, row=row: magnitude_keys(row[some]))  # type: ignore[misc]
            for layer, row in zip(layers, rows, strict=True)
        ]
        problem = Problem(count + 1, self._budget.start, candidates)
        (cut,) = select([problem], key_bits(torch.float64), self._groups, self._device)
        for layer, s in zip(layers, scores, strict=True):
            stays = magnitude_keys(s) > cut.bits
            local(layer.params.e).mul_(stays[layer.rows, None])

    def _shards(self) -> dist.ProcessGroup | None:
        """The ranks that hold the other rows of a stage."""
        return next((shard_group(layer.params.a) for layer in self._layers.values()), None)


def _scores(layer: Layer) -> Tensor:
    """What this rank adds to the scores of a matrix's triplets (r,), float64."""
    a, e, b = (local(avg).double() * local(unc).double() for avg, unc in zip(layer.avg, layer.unc, strict=True))
    scores = b.sum(0) / layer.params.b.size(0)
    scores[layer.rows] += e.flatten() + a.mean(1)
    return scores


def _zeros(p: Tensor) -> Tensor:
    """An average of a parameter's numbers, split as it is."""
    return laid_like(p, torch.zeros_like(local(p.detach()), dtype=wide_dtype(p.dtype)))


def _in_place(layer: Layer, rows: Tensor) -> Tensor:
    """This rank's rows among all of A's, which are 0."""
    whole = torch.zeros(layer.params.a.shape, dtype=wide_dtype(rows.dtype), device=rows.device)
    whole[layer.rows] = rows.to(whole.dtype)
    return whole


def _apart(gram: Tensor) -> Tensor:
    """(G - I) / |G - I|, by which the gradient of |P P^T - I| is 2 (G - I) P / |G - I|."""
    apart = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return apart / apart.norm().clamp_min(torch.finfo(gram.dtype).tiny)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad)


def _add_(p: Tensor, gradient: Tensor) -> None:
    """Adds to this rank's rows of a gradient."""
    rows = _gradient(p)
    rows.add_(gradient.to(rows.dtype))
