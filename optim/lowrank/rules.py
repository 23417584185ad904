"""GaLore, DCT projection, Fira, APOLLO and APOLLO-Mini on R = G Q: with Q on the right, R is split by rows like G.

With N = adam(R), phi_i = |N_i| / |R_i| (norms of rows), a the scale, s = sqrt(a), and c = sqrt(1 - b2^t) / (1 - b1^t), Adam's
bias correction:

| rule | update | source |
|---|---|---|
| galore | a N Q^T | Zhao et al., *GaLore* |
| dct | a N Q^T, moments follow their columns when Q changes | Modoranu et al., *SVD-Free Low-Rank Adaptive Gradient Optimization* |
| fira, `form=code` | a N Q^T + S, S = phi (G - a R Q^T), |S| / c limited | their FiraAdamW |
| fira, `form=paper` | a (N Q^T + S), S = phi (G - R Q^T), |S| limited | Chen et al., *Fira*, Algorithm 1 |
| apollo | s U, U = phi G, |U| / c limited | Zhu et al., *APOLLO*, and their code |
| apollo_mini | s U, U = (|N| / |R|) G, r = 1, norms of the whole matrix, |U| / c limited | the same |

Limited: to at most `growth` times what it was, after its own limiting, in the step before (where that was not 0).

**Wide matrices**, m < n. The papers project the short side, R = P^T G (r, n), and take their norms by columns.

`side=short` does so: one all-to-all turns G into G^T (n, m), which is tall, its states are (n, r), split by rows, and a
second one turns the update back. `side=right` keeps R = G Q (m, r) and the update times sqrt(n / m), which gives it the
size of theirs: an entry of N is of the size of 1 whatever its shape and Q is orthonormal, so |N Q^T| is sqrt(m r) where
theirs is sqrt(n r). In the others phi_i is about sqrt(r) / |R_i|, with |R_i| a fixed share of |G_i|, so |phi G| is sqrt(m r)
and sqrt(n r), each times that share, again.

Crosses the shard axis: at a refresh what `projection` says; at every step, where the growth is limited, 1 number a matrix
for fira and apollo; 2 for apollo_mini, and 1 more where it is limited; with `side=short` 2 m n / N of a wide matrix. State
bytes of a matrix (m, n) in fp32: 8 m r / N, and beside it 4 n r (galore, fira), 4 r (dct), and 4 where the growth is limited;
m and n change places where the matrix is turned.
"""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from rowwise.kernels import torch_lists
from rowwise.kernels.dct import dct_columns
from rowwise.kernels.philox import stream_key
from rowwise.kernels.row_scale import scale_rows
from rowwise.optim.adamw import state_dtype
from rowwise.optim.lowrank.config import ApolloConfig, ApolloMiniConfig, FiraConfig, ProjectedBase
from rowwise.optim.lowrank.moments import adam_directions, new_moments, read, write
from rowwise.optim.lowrank.projection import ROUNDING, dct_choices, project, random_projection, subspace_bases
from rowwise.optim.rule import Batch, all_reduce_, apply_, pick
from rowwise.optim.transpose import from_tall, is_wide, tall_shape, to_tall, transposed_like


class LowRank:
    """Holds what the rules share: moments of R, when the projection is renewed, and which side of a wide matrix it is on. `rank`
    is that of matrices whose narrow side has it."""

    name: str
    fused = False
    rounds = rounds_on_host = False
    by_rows = False
    shared = False
    weightwise: ClassVar[dict[str, int]] = {}

    def __init__(self, config: ProjectedBase, rank: int, bits: int):
        self._rank, self._bits, self._every, self._scale = rank, bits, config.refresh_every, config.scale
        self._short = config.side == "short"
        (self.beta1, self._beta2), self._eps = config.betas, config.eps

    def rank_of(self, shape: torch.Size) -> int:
        """Finds r of a matrix."""
        return min(self._rank, *shape)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return self._new_state(transposed_like(p) if self._short and is_wide(p.shape) else p)

    def step_(self, batch: Batch) -> None:
        held = batch
        if self._short:
            shapes = [tall_shape(shape) for shape in batch.shapes]
            held = replace(batch, grads=to_tall(batch.grads, batch.shapes, batch.group), shapes=shapes)
        updates = self._updates(held)
        for update, (m, n) in zip(updates, held.shapes, strict=True):
            if m < n:
                update.mul_(math.sqrt(n / m))
        apply_(batch, from_tall(updates, batch.shapes, batch.group) if self._short else updates)

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        """Makes the state of a matrix that is projected on the right."""
        return new_moments(p, self.rank_of(p.shape), self._bits)

    def _updates(self, batch: Batch) -> list[Tensor]:
        """Computes what is to be subtracted, times the learning rate, of matrices that are projected on the right."""
        raise NotImplementedError

    def _due(self, batch: Batch) -> bool:
        return (batch.step - 1) % self._every == 0

    def _directions(self, batch: Batch, rs: list[Tensor]) -> list[Tensor]:
        return adam_directions(rs, batch.states, batch.step, self.beta1, self._beta2, self._eps)

    def _correction(self, batch: Batch) -> float:
        """Computes c, what bias correction has multiplied N by."""
        return math.sqrt(1 - self._beta2**batch.step) / (1 - self.beta1**batch.step)


class GaLore(LowRank):
    """Projects on singular vectors. State beside the moments: `basis` (n, r), the same on every rank."""

    name = "galore"

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        basis = torch.zeros(p.size(1), self.rank_of(p.shape), dtype=state_dtype(p), device=p.device)
        return super()._new_state(p) | {"basis": basis}

    def _bases(self, batch: Batch) -> list[Tensor]:
        bases = pick(batch, "basis")
        if self._due(batch):
            keys = [stream_key(batch.seed, f"subspace/{name}/{batch.step}") for name in batch.names]
            renewed = subspace_bases(batch.grads, bases, batch.shapes, keys, batch.group)
            torch_lists.copy_(bases, renewed)
        return bases

    def _updates(self, batch: Batch) -> list[Tensor]:
        bases = self._bases(batch)
        return back(self._directions(batch, project(batch.grads, bases)), bases, self._scale)


class DCT(LowRank):
    """Projects on cosines. State beside the moments: `columns` (r,), which columns of the DCT matrix, the same on every rank."""

    name = "dct"

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        columns = torch.full((self.rank_of(p.shape),), -1, dtype=torch.int32, device=p.device)
        return super()._new_state(p) | {"columns": columns}

    def _updates(self, batch: Batch) -> list[Tensor]:
        columns = pick(batch, "columns")
        if self._due(batch):
            chosen = dct_choices(batch.grads, [len(c) for c in columns], batch.group)
            for state, some, g in zip(batch.states, chosen, batch.grads, strict=True):
                follow_columns_(state, some, g)
        bases = [dct_columns(g.size(1), c.long(), g.dtype, g.device) for g, c in zip(batch.grads, columns, strict=True)]
        return back(self._directions(batch, project(batch.grads, bases)), bases, self._scale)


class Limited(LowRank):
    """Limits how fast a norm grows. State: `limit` (1,), the norm of the step before (0: none), the same on every rank."""

    def __init__(self, config: FiraConfig | ApolloConfig | ApolloMiniConfig, rank: int, bits: int):
        super().__init__(config, rank, bits)
        self._growth = config.growth

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        limit = {"limit": torch.zeros(1, dtype=state_dtype(p), device=p.device)} if self._growth else {}
        return super()._new_state(p) | limit

    def _limit_(self, batch: Batch, xs: list[Tensor], squares: list[Tensor], correction: float) -> None:
        """Multiplies what has the squared norms `squares` (summed over the shard axis) by what limits |x| / correction."""
        if self._growth is None:
            return
        for x, square, limit in zip(xs, squares, pick(batch, "limit"), strict=True):
            x.mul_(limited(square.sqrt() / correction, limit, self._growth))


class Fira(Limited, GaLore):
    """Adds what is outside of the subspace to GaLore. State: GaLore's, and the `limit` of |S|."""

    name = "fira"

    def __init__(self, config: FiraConfig, rank: int, bits: int):
        super().__init__(config, rank, bits)
        self._as_paper = config.form == "paper"

    def _updates(self, batch: Batch) -> list[Tensor]:
        bases = self._bases(batch)
        rs = project(batch.grads, bases)
        inside = back(rs, bases, 1.0 if self._as_paper else self._scale)
        outside: list[Tensor] = list(torch_lists.sub(batch.grads, inside))
        directions = self._directions(batch, rs)
        scaled = [scale_rows(n, r, x) for n, r, x in zip(directions, rs, outside, strict=True)]
        squares = [square.reshape(1) for _, square in scaled]
        if self._growth is not None:
            all_reduce_(squares, batch.group)
            # Where the basis has all of G, the paper's S is rounding beside N, whose numbers are about 1: no limit to later ones.
            ones = [shape[0] * basis.size(1) for shape, basis in zip(batch.shapes, bases, strict=True)]
            squares = [s.where(s > ROUNDING**2 * count, 0) for s, count in zip(squares, ones, strict=True)]
        beside = [s for s, _ in scaled]
        self._limit_(batch, beside, squares, 1.0 if self._as_paper else self._correction(batch))
        updates = back(directions, bases, self._scale)
        torch_lists.add_(updates, beside, alpha=self._scale if self._as_paper else 1.0)
        return updates


class Apollo(Limited):
    """Scales gradients row by row. State beside the moments: the `limit` of |U|.

    The projection is drawn anew at every step from (seed, name, refresh)."""

    name = "apollo"

    def _projected(self, batch: Batch) -> list[Tensor]:
        refresh = (batch.step - 1) // self._every
        return [
            g @ random_projection(batch.seed, name, refresh, g.size(1), self.rank_of(shape), g)
            for g, name, shape in zip(batch.grads, batch.names, batch.shapes, strict=True)
        ]

    def _updates(self, batch: Batch) -> list[Tensor]:
        rs = self._projected(batch)
        scaled = [scale_rows(n, r, g) for n, r, g in zip(self._directions(batch, rs), rs, batch.grads, strict=True)]
        updates, squares = [u for u, _ in scaled], [square.reshape(1) for _, square in scaled]
        if self._growth is not None:
            all_reduce_(squares, batch.group)
        self._limit_(batch, updates, squares, self._correction(batch))
        torch_lists.mul_(updates, math.sqrt(self._scale))
        return updates


class ApolloMini(Apollo):
    """Scales gradients by one factor a matrix."""

    name = "apollo_mini"

    def _updates(self, batch: Batch) -> list[Tensor]:
        rs = self._projected(batch)
        triples = zip(self._directions(batch, rs), rs, batch.grads, strict=True)
        if self._growth is None:
            norms = [torch.stack((n.square().sum(), r.square().sum())) for n, r, _ in triples]
        else:
            norms = [torch.stack([x.square().sum() for x in triple]) for triple in triples]
        all_reduce_(norms, batch.group)
        factors = [torch.where(s[1:2] > 0, (s[0:1] / s[1:2]).sqrt(), torch.zeros_like(s[0:1])) for s in norms]
        squares = [factor.square() * s[2:] for factor, s in zip(factors, norms, strict=True)]
        self._limit_(batch, factors, squares, self._correction(batch))
        return [g * (factor * math.sqrt(self._scale)) for g, factor in zip(batch.grads, factors, strict=True)]


def limited(norm: Tensor, limit: Tensor, growth: float) -> Tensor:
    """Finds the factor that keeps a norm at most growth x what it was; `limit` becomes what it is, in place."""
    most = growth * limit
    factor = torch.where((limit > 0) & (norm > most), most / norm, torch.ones_like(norm))
    limit.copy_(norm * factor)
    return factor


def back(directions: list[Tensor], bases: list[Tensor], scale: float) -> list[Tensor]:
    """Projects back: scale N Q^T."""
    updates = [n @ q.T for n, q in zip(directions, bases, strict=True)]
    torch_lists.mul_(updates, scale)
    return updates


def follow_columns_(state: dict[str, Tensor], chosen: Tensor, like: Tensor) -> None:
    """Moves the moments from the DCT columns of before to the `chosen` ones, in place: the basis is orthonormal, so a
    column that stays keeps its moments and a new one begins at zero."""
    kept_at = (chosen.unsqueeze(1) == state["columns"].unsqueeze(0)).long()
    stays, place = kept_at.any(1), kept_at.argmax(1)
    write(state, *(torch.where(stays, old[:, place], torch.zeros_like(old[:1, :1])) for old in read(state, like)))
    state["columns"].copy_(chosen)
