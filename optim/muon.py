"""Muon (Jordan et al.): the momentum, orthogonalised by Newton-Schulz, without gathering it.

    M = b M + G       X_0 = (G + b M) / |G + b M|       X_(k+1) = a X_k + (b' S + c S^2) X_k  with  S = X_k X_k^T
    x = x - lr wd x - lr 0.2 sqrt(max(m, n)) X_5

The scale gives the root mean square of an AdamW update (Liu et al., *Muon is Scalable for LLM Training*), so that
AdamW's learning rate and decay serve.

Every iterate is X_0 p(A) with A = X_0^T X_0 (n x n) and p a polynomial. For m >= n, A is summed over the shard axis to the
one rank that computes p(A) and sends it back (n^2 numbers each way, together what an all-reduce moves); then every rank
multiplies its own rows by it. Ranks share the matrices out, so that the polynomials, most of the work, are computed once
and at the same time. For m < n one all-to-all turns rows into columns, the Gram matrix is m x m, and a second all-to-all
turns the result back (m n / N numbers a rank each way). No rank ever holds the whole. The polynomial is computed in
float32's precision (float64 in float64): see `kernels.products`.

State bytes per parameter: 4 (`momentum`, split like the parameter).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.conf.option import Fixed, MayChange
from rowwise.kernels import torch_lists
from rowwise.kernels.products import product
from rowwise.optim.adamw import state_dtype
from rowwise.optim.common import AdamBase
from rowwise.optim.rule import Batch, Rule, apply_, pick, zeros_of
from rowwise.optim.transpose import from_tall, to_tall

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
AS_ADAMW = 0.2  # about the root mean square of an AdamW update


@dataclass(frozen=True, kw_only=True)
class MuonConfig(AdamBase):
    """Hidden matrices follow Muon, everything else AdamW with the same learning rate. `momentum`: how much of it a step
    keeps."""

    name: Fixed[Literal["muon"]] = "muon"
    momentum: MayChange[float] = 0.95

    def check(self) -> None:
        super().check()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum}: from 0 to below 1")

    def new_rule(self) -> Rule:
        return Muon(self.momentum)


def newton_schulz_polynomial(grams: Tensor) -> Tensor:
    """Computes P (..., k, k) with X_5 = X P for any X whose X^T X = `grams`: the normalisation and all five iterations, in 17
    products."""
    norm = grams.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))  # a gradient of zeros stays one
    a, b, c = COEFFICIENTS
    grams = grams / scale**2
    identity = torch.eye(grams.size(-1), dtype=grams.dtype, device=grams.device)
    s = grams
    p = a * identity + b * s + c * product(s, s)
    for _ in range(ITERATIONS - 1):
        s = product(product(p, grams), p)  # the iterate's own Gram matrix: p and gram commute
        p = product(p, a * identity + b * s + c * product(s, s))
    return p / scale


class Muon:
    """State: `momentum` (m, n), split like the parameter."""

    name = "muon"
    fused = False
    rounds = rounds_on_host = False
    by_rows = False
    shared = True
    weightwise: ClassVar[dict[str, int]] = {"momentum": 0}

    def __init__(self, momentum: float):
        self._momentum = momentum

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"momentum": zeros_of(p, state_dtype(p))}

    def step_(self, batch: Batch) -> None:
        momenta = pick(batch, "momentum")
        torch_lists.mul_(momenta, self._momentum)
        torch_lists.add_(momenta, batch.grads)
        nesterov = torch_lists.add(batch.grads, momenta, alpha=self._momentum)
        apply_(batch, orthogonalise(list(nesterov), batch.shapes, batch.group))


def orthogonalise(xs: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Computes 0.2 sqrt(max(m, n)) X_5 of every logical matrix, given and returned as local rows; `group` is the shard axis."""
    tall = to_tall(xs, shapes, group)
    results: list[Tensor] = [torch.empty(0)] * len(xs)
    for i, polynomial in polynomials(tall, group):
        results[i] = product(tall[i], polynomial) * (AS_ADAMW * math.sqrt(max(shapes[i])))
    return from_tall(results, shapes, group)


def polynomials(xs: list[Tensor], group: dist.ProcessGroup | None) -> Iterator[tuple[int, Tensor]]:
    """Yields (i, P_i) for the logical X_i of which xs[i] (m_p, k_i) are local rows, in an order of its own.

    Each is computed by one rank of `group`: a reduction of its Gram matrices to every rank that has some, and a broadcast
    of its polynomials, k_i^2 numbers a matrix each. Beside a rank's own, those of one other rank exist at a time.
    """
    sides = [x.size(1) for x in xs]
    if group is None:
        yield from enumerate(by_shape([product(x.T, x) for x in xs]))
        return
    shares, mine = share_out(sides, group.size()), group.rank()
    own = torch.empty(0)
    for rank, share in shares.items():
        flat = torch.cat([product(xs[i].T, xs[i]).view(-1) for i in share])
        dist.reduce(flat, group=group, group_dst=rank)
        own = flat if rank == mine else own
    if mine in shares:
        own = torch.cat([p.reshape(-1) for p in by_shape(squares(own, [sides[i] for i in shares[mine]]))])
    for rank, share in shares.items():
        flat = own if rank == mine else xs[0].new_empty(sum(sides[i] ** 2 for i in share))
        dist.broadcast(flat, group=group, group_src=rank)
        yield from zip(share, squares(flat, [sides[i] for i in share]), strict=True)


def squares(flat: Tensor, sides: list[int]) -> list[Tensor]:
    """Returns the (k, k) matrices that stand one after the other in `flat`."""
    return [part.view(k, k) for part, k in zip(flat.split([k * k for k in sides]), sides, strict=True)]


def by_shape(grams: list[Tensor]) -> list[Tensor]:
    """Returns the polynomial of every Gram matrix; those of one size are computed as one batch."""
    found: list[Tensor] = list(grams)
    for side in dict.fromkeys(gram.size(0) for gram in grams):
        alike = [i for i, gram in enumerate(grams) if gram.size(0) == side]
        for i, polynomial in zip(alike, newton_schulz_polynomial(torch.stack([grams[i] for i in alike])), strict=True):
            found[i] = polynomial
    return found


def share_out(sides: list[int], ranks: int) -> dict[int, list[int]]:
    """Shares out the work: rank -> the matrices (k, k) that are its: the largest first, each to the rank with the least work."""
    work = [0] * ranks
    shares: dict[int, list[int]] = {}
    for i in sorted(range(len(sides)), key=lambda i: (-sides[i], i)):
        rank = min(range(ranks), key=lambda r: (work[r], r))
        work[rank] += sides[i] ** 3
        shares.setdefault(rank, []).append(i)
    return shares
