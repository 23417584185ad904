"""Which r directions of a gradient's rows are kept: three ways to an n x r matrix Q with R = G Q.

| projection | Q | crosses the shard axis at a refresh, per matrix | kept between steps |
|---|---|---|---|
| subspace | the top r right singular vectors of G, by subspace iteration (Halko et al.) | n (r + p) + (r + p)^2 | Q, n r numbers |
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


def gaussian(key: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) standard normal numbers, the same on every rank and layout."""
    drawn = normal(key, 0, rows * columns, like.device).view(rows, columns)
    return drawn.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def random_projection(seed: int, name: str, refresh: int, columns: int, rank: int, like: Tensor) -> Tensor:
    """Gaussian (n, r) / sqrt(r) of one matrix and refresh."""
    return gaussian(stream_key(seed, f"projection/{name}/{refresh}"), columns, rank, like) / math.sqrt(rank)


def subspace_bases(
    grads: list[Tensor],
    starts: list[Tensor],
    shapes: list[torch.Size],
    keys: list[int],
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """The top r right singular vectors (n, r) of every G, from the bases of before (zeros: from random ones).

        Y = G^T (G W), W = [basis of before, Gaussian]      all-reduced: n (r + p)
        Q' = qr(Y)      B = G Q'      B^T B = U S^2 U^T     all-reduced: (r + p)^2
        Q = Q' U, the first r columns

    A singular vector's sign is chosen so that its largest entry is positive.
    """
    wide = [start_directions(basis, shape, key) for basis, shape, key in zip(starts, shapes, keys, strict=True)]
    ys = [g.T @ (g @ w) for g, w in zip(grads, wide, strict=True)]
    all_reduce_(ys, group)
    qs = [torch.linalg.qr(y).Q for y in ys]
    bs = [g @ q for g, q in zip(grads, qs, strict=True)]
    grams = [b.T @ b for b in bs]
    all_reduce_(grams, group)
    return [leading(q, gram, basis.size(1)) for q, gram, basis in zip(qs, grams, starts, strict=True)]


def start_directions(basis: Tensor, shape: torch.Size, key: int) -> Tensor:
    """(n, r + p): the basis of before and p random directions; all random where there was none."""
    n, rank = basis.shape
    extra = min(OVERSAMPLE, min(shape) - rank)
    if not basis.any():
        return gaussian(key, n, rank + extra, basis)
    return torch.cat([basis, gaussian(key, n, extra, basis)], dim=1) if extra else basis


def leading(q: Tensor, gram: Tensor, rank: int) -> Tensor:
    """q rotated onto the eigenvectors of `gram`, the `rank` largest first, each with its largest entry positive.

    A gradient that is no number gives no number, for the step's report to find; `eigh` would raise here and now."""
    if not gram.isfinite().all():
        return torch.full_like(q[:, :rank], torch.nan)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    rotated = q @ vectors
    largest = rotated.gather(0, rotated.abs().argmax(0, keepdim=True))
    return rotated * torch.where(largest < 0, -1, 1).to(rotated.dtype)


def dct_choices(grads: list[Tensor], ranks: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The indices (r,) of the DCT columns with the largest projections of every G, ascending. All-reduced: n."""
    squares = [column_squares(g) for g in grads]
    all_reduce_(squares, group)
    return [torch.topk(s, r).indices.sort().values for s, r in zip(squares, ranks, strict=True)]
