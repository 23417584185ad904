"""GaLore, DCT projection, Fira, APOLLO and APOLLO-Mini, all on R = G Q with Q on the right (our choice: R is then split
by rows like G, and nothing of G or W is ever gathered).

With N = adam(R), phi_i = |N_i| / |R_i| (norms of rows) and a the scale:

| rule | update | source |
|---|---|---|
| galore | a N Q^T | Zhao et al., *GaLore* |
| dct | a N Q^T, moments follow their columns when Q changes | Modoranu et al., *SVD-Free Low-Rank Adaptive Gradient Optimization* |
| fira | a (N Q^T + S), S = phi (G - R Q^T), limited to growth x the |S| before | Chen et al., *Fira* |
| apollo | a phi G | Zhu et al., *APOLLO* |
| apollo_mini | a (|N| / |R|) G, r = 1, norms of the whole matrix | the same |

Crosses the shard axis: at a refresh what `projection` says; at every step 1 number a matrix for fira, 2 for apollo_mini,
nothing for the others. State bytes of a matrix (m, n) in fp32: 8 m r / N, and beside it 4 n r (galore, fira), 4 r (dct),
nothing (apollo).
"""

from typing import ClassVar

import torch
from torch import Tensor

from rowwise.kernels.dct import dct_columns
from rowwise.kernels.philox import stream_key
from rowwise.kernels.row_scale import scale_rows
from rowwise.optim.adamw import state_dtype
from rowwise.optim.lowrank.moments import adam_directions, new_moments, read, write
from rowwise.optim.lowrank.projection import dct_choices, random_projection, subspace_bases
from rowwise.optim.rule import Batch, all_reduce_, apply_, pick


class LowRank:
    """What the rules share: moments of R, and when the projection is renewed."""

    name: str
    fused = False
    rounds = False
    shared = False
    weightwise: ClassVar[dict[str, int]] = {}

    def __init__(self, rank: int, refresh_every: int, scale: float, bits: int, betas: list[float], eps: float):
        self._rank, self._every, self._scale, self._bits = rank, refresh_every, scale, bits
        (self.beta1, self._beta2), self._eps = betas, eps

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return new_moments(p, self._rank, self._bits)

    def _due(self, batch: Batch) -> bool:
        return (batch.step - 1) % self._every == 0

    def _directions(self, batch: Batch, rs: list[Tensor]) -> list[Tensor]:
        return adam_directions(rs, batch.states, batch.step, self.beta1, self._beta2, self._eps)


class GaLore(LowRank):
    """State beside the moments: `basis` (n, r), the same on every rank."""

    name = "galore"

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        basis = torch.zeros(p.size(1), self._rank, dtype=state_dtype(p), device=p.device)
        return super().new_state(p) | {"basis": basis}

    def _bases(self, batch: Batch) -> list[Tensor]:
        bases = pick(batch, "basis")
        if self._due(batch):
            keys = [stream_key(batch.seed, f"subspace/{name}/{batch.step}") for name in batch.names]
            renewed = subspace_bases(batch.grads, bases, batch.shapes, keys, batch.group)
            torch._foreach_copy_(bases, renewed)
        return bases

    def step_(self, batch: Batch) -> None:
        bases = self._bases(batch)
        directions = self._directions(batch, project(batch.grads, bases))
        apply_(batch, back(directions, bases, self._scale))


class DCT(LowRank):
    """State beside the moments: `columns` (r,), which columns of the DCT matrix, the same on every rank."""

    name = "dct"

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        columns = torch.full((self._rank,), -1, dtype=torch.int32, device=p.device)
        return super().new_state(p) | {"columns": columns}

    def step_(self, batch: Batch) -> None:
        if self._due(batch):
            for state, chosen, g in zip(
                batch.states, dct_choices(batch.grads, self._rank, batch.group), batch.grads, strict=True
            ):
                follow_columns_(state, chosen, g)
        bases = [
            dct_columns(g.size(1), c.long(), g.dtype, g.device)
            for g, c in zip(batch.grads, pick(batch, "columns"), strict=True)
        ]
        directions = self._directions(batch, project(batch.grads, bases))
        apply_(batch, back(directions, bases, self._scale))


class Fira(GaLore):
    """State beside GaLore's: `limit` (1,), |S| of the step before (0: none), the same on every rank."""

    name = "fira"

    def __init__(self, growth: float, **settings):
        super().__init__(**settings)
        self._growth = growth

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return super().new_state(p) | {"limit": torch.zeros(1, dtype=state_dtype(p), device=p.device)}

    def step_(self, batch: Batch) -> None:
        bases = self._bases(batch)
        rs = project(batch.grads, bases)
        outside = [g - r @ q.T for g, r, q in zip(batch.grads, rs, bases, strict=True)]
        directions = self._directions(batch, rs)
        scaled = [scale_rows(n, r, x) for n, r, x in zip(directions, rs, outside, strict=True)]
        squares = [square.reshape(1) for _, square in scaled]
        all_reduce_(squares, batch.group)
        updates = back(directions, bases, self._scale)
        for u, (s, _), square, limit in zip(updates, scaled, squares, pick(batch, "limit"), strict=True):
            u.add_(s * (limited(square.sqrt(), limit, self._growth) * self._scale))
        apply_(batch, updates)


def limited(norm: Tensor, limit: Tensor, growth: float) -> Tensor:
    """The factor that keeps |S| at most growth x what it was; `limit` becomes what it is, in place."""
    most = growth * limit
    factor = torch.where((limit > 0) & (norm > most), most / norm, torch.ones_like(norm))
    limit.copy_(norm * factor)
    return factor


class Apollo(LowRank):
    """No state beside the moments: the projection is drawn anew at every step from (seed, name, refresh). Without the
    norm-growth limiter that the authors' code adds, so that no step communicates."""

    name = "apollo"

    def _projected(self, batch: Batch) -> list[Tensor]:
        refresh = (batch.step - 1) // self._every
        return [
            g @ random_projection(batch.seed, name, refresh, g.size(1), self._rank, g)
            for g, name in zip(batch.grads, batch.names, strict=True)
        ]

    def step_(self, batch: Batch) -> None:
        rs = self._projected(batch)
        directions = self._directions(batch, rs)
        updates = [scale_rows(n, r, g)[0] for n, r, g in zip(directions, rs, batch.grads, strict=True)]
        torch._foreach_mul_(updates, self._scale)
        apply_(batch, updates)


class ApolloMini(Apollo):
    """One scale a matrix."""

    name = "apollo_mini"

    def step_(self, batch: Batch) -> None:
        rs = self._projected(batch)
        directions = self._directions(batch, rs)
        norms = [torch.stack((n.square().sum(), r.square().sum())) for n, r in zip(directions, rs, strict=True)]
        all_reduce_(norms, batch.group)
        factors = [torch.where(s[1] > 0, (s[0] / s[1]).sqrt(), torch.zeros_like(s[0])) * self._scale for s in norms]
        apply_(batch, [g * factor for g, factor in zip(batch.grads, factors, strict=True)])


def project(grads: list[Tensor], bases: list[Tensor]) -> list[Tensor]:
    """R = G Q."""
    return [g @ q for g, q in zip(grads, bases, strict=True)]


def back(directions: list[Tensor], bases: list[Tensor], scale: float) -> list[Tensor]:
    """scale N Q^T."""
    updates = [n @ q.T for n, q in zip(directions, bases, strict=True)]
    torch._foreach_mul_(updates, scale)
    return updates


def follow_columns_(state: dict[str, Tensor], chosen: Tensor, like: Tensor) -> None:
    """Moves the moments from the DCT columns of before to the `chosen` ones, in place: the basis is orthonormal, so a
    column that stays keeps its moments and a new one begins at zero."""
    kept_at = (chosen.unsqueeze(1) == state["columns"].unsqueeze(0)).long()
    stays, place = kept_at.any(1), kept_at.argmax(1)
    write(state, *(torch.where(stays, old[:, place], torch.zeros_like(old[:1, :1])) for old in read(state, like)))
    state["columns"].copy_(chosen)
