"""Which r directions of a gradient's rows are kept: three ways to an n x r matrix Q with R = G Q.

| projection | Q | crosses the shard axis at a refresh, per matrix | kept between steps |
|---|---|---|---|
| subspace | the top r right singular vectors of G, by subspace iteration (Halko et al.) | n (r + p) + 2 (r + p)^2 | Q, n r numbers |
| DCT | the r columns of the orthonormal DCT-II matrix of largest |G d_j| (Modoranu et al.) | n | r indices |
| random | Gaussian / sqrt(r) (Johnson-Lindenstrauss), drawn anew from its counter | nothing | nothing |

Nothing crosses between refreshes. G (m, n) is split by rows; Q is the same on every rank.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.dct import column_squares
from rowwise.kernels.philox import normal, stream_key
from rowwise.optim.rule import all_reduce_

OVERSAMPLE = 8  # p: directions beyond r that the iteration carries, so that the r-th is found well
# Below this share of the largest singular value float32 finds no direction; float64 finds those above it to 1e-10.
FAINT = 2**-15
ROUNDING = (
    2**-20
)  # of the largest number beside it: what is smaller is 0, and what differs from it by less is its equal


def gaussian(key: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Draws (rows, columns) standard normal numbers, the same on every rank and layout."""
    drawn = normal(key, 0, rows * columns, like.device).view(rows, columns)
    return drawn.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def random_projection(seed: int, name: str, refresh: int, columns: int, rank: int, like: Tensor) -> Tensor:
    """Draws the projection of one matrix and refresh: Gaussian (n, r) / sqrt(r)."""
    return gaussian(stream_key(seed, f"projection/{name}/{refresh}"), columns, rank, like) / math.sqrt(rank)


def subspace_bases(
    grads: list[Tensor],
    starts: list[Tensor],
    shapes: list[torch.Size],
    keys: list[int],
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Finds the top r right singular vectors (n, r) of every G, from the bases of before (zeros: from random ones).

        P = G W, W = [basis of before, Gaussian]    P = P T(P^T P)           all-reduced: (r + p)^2
        Y = G^T P                                   Y T(P^T P) = Q S U^T     all-reduced: n (r + p) + (r + p)^2

    T(P^T P) makes columns of P orthonormal, twice: a direction of P^T P, which has squares of singular values, sinks in
    rounding where its value is below sqrt(eps) of the largest, and the second time they are near to each other.
    """
    wide = [start_directions(basis, shape, key) for basis, shape, key in zip(starts, shapes, keys, strict=True)]
    ps = [g @ w for g, w in zip(grads, wide, strict=True)]
    grams = [p.T @ p for p in ps]
    all_reduce_(grams, group)
    ps = [p @ whitening(gram) for p, gram in zip(ps, grams, strict=True)]
    ys, grams = [g.T @ p for g, p in zip(grads, ps, strict=True)], [p.T @ p for p in ps]
    all_reduce_([*ys, *grams], group)
    found = [y @ whitening(gram) for y, gram in zip(ys, grams, strict=True)]
    return [leading(y, basis.size(1), key) for y, basis, key in zip(found, starts, keys, strict=True)]


def start_directions(basis: Tensor, shape: torch.Size, key: int) -> Tensor:
    """Makes (n, r + p): the basis of before and p random directions; all random where there was none."""
    n, rank = basis.shape
    extra = min(OVERSAMPLE, min(shape) - rank)
    if not basis.any():
        return gaussian(key, n, rank + extra, basis)
    return torch.cat([basis, gaussian(key, n, extra, basis)], dim=1) if extra else basis


def whitening(gram: Tensor) -> Tensor:
    """Finds T, for which P T has orthonormal columns, from P^T P = U D U^T: U D^(-1/2) (Stathopoulos & Wu's SVQB).

    What of D is rounding counts as eps of the largest. A gradient that is no number gives no number, for the step's report
    to find; `eigh` would raise here and now."""
    if not gram.isfinite().all():
        return torch.full_like(gram, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    limits = torch.finfo(gram.dtype)
    return vectors * values.clamp(min=limits.eps * values[-1]).clamp(min=limits.tiny).rsqrt()


def leading(y: Tensor, rank: int, key: int) -> Tensor:
    """Finds the first `rank` left singular vectors of y, each with its largest entry positive (of equal ones, the first).

    Of those that are faint roundings decide, and a layout has roundings of its own: random directions at right angles to
    the others take their place."""
    if not y.isfinite().all():
        return torch.full_like(y[:, :rank], torch.nan)
    q, r = torch.linalg.qr(y)
    vectors, values, _ = torch.linalg.svd(r)
    found = q @ vectors[:, : int((values[:rank] > FAINT * values[0]).sum())]
    if (missing := rank - found.size(1)) > 0:
        found = torch.linalg.qr(torch.cat([found, gaussian(key, y.size(0), missing, y)], dim=1)).Q
    sizes = found.abs()
    largest = (sizes > (1 - ROUNDING) * sizes.amax(0)).byte().argmax(0, keepdim=True)
    return found * torch.where(found.gather(0, largest) < 0, -1, 1).to(found.dtype)


def project(grads: list[Tensor], bases: list[Tensor]) -> list[Tensor]:
    """Makes R = G Q. What is nothing beside its row's largest is rounding and becomes 0: Adam would make it as large."""
    rs = [g @ q for g, q in zip(grads, bases, strict=True)]
    for r in rs:
        sizes = r.abs()
        r.mul_(sizes.ge_(ROUNDING * sizes.amax(1, keepdim=True)))
    return rs


def dct_choices(grads: list[Tensor], ranks: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Chooses the DCT columns with the largest projections of every G: indices (r,), ascending. All-reduced: n.

    Projections that are rounding are all 0, and of equal ones the lower frequency is chosen."""
    squares = [column_squares(g) for g in grads]
    all_reduce_(squares, group)
    heard = [s.where(s > ROUNDING**2 * s.sum(), 0) for s in squares]
    return [s.sort(descending=True, stable=True).indices[:r].sort().values for s, r in zip(heard, ranks, strict=True)]
