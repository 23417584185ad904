"""A matrix as one of low rank and what remains, as adapters begin with: functions of matrices alone.

    W (m, n)  =  R + s B A        A (r, n), B (m, r), s the adapter's scale; U S V^T = W, its singular values descending

    pissa    B A s = U_r S_r V_r^T, so that the principal part learns (Meng et al., *PiSSA*)
    corda    of U S V^T = W C, with the covariance C (n, n) of what the layer takes: B A s = U_r S_r V_r^T C^-1, the part that matters
             most for such inputs, or least (Yang et al., *CorDA*: "instruction" and "knowledge")
    eva      A = the principal components of what the layer takes, B = 0, R = W (Paischer et al., *EVA*)
    lq       R is made of few bits: A, B and R are found in turn, until the error grows (Guo et al., *LQ-LoRA*)

Half of the singular values goes into each of A and B. Arithmetic is in float32, of float64 in float64.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rowwise.kernels.coded_rows import RowForm, decode_rows, encode_rows, least_scale
from rowwise.kernels.philox import normal
from rowwise.kernels.wide import wide

OVERSAMPLED = 10  # columns beyond the rank in LQ-LoRA's sketch
POWERS = 2  # passes that sharpen it, as in torch.svd_lowrank
WHOLE = 4  # of a matrix whose narrow side is below this multiple of the sketch's, all singular values are computed


class Parts(NamedTuple):
    """What a matrix (m, n) is made of: R + s B A."""

    rest: Tensor
    a: Tensor
    b: Tensor


def pissa(w: Tensor, rank: int, scale: float) -> Parts:
    """Takes the principal part of W."""
    w = wide(w)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return without(w, root[:, None] * vt[:rank], u[:, :rank] * root, scale)


def corda(w: Tensor, covariance: Tensor, rank: int, scale: float, part: Literal["most", "least"] = "most") -> Parts:
    """Takes the part of W that matters `most` for inputs of a covariance (n, n), or `least`. Raises ValueError where that cannot be
    inverted."""
    w, c = wide(w), wide(covariance).to(wide(w).dtype)
    damped, inverse = _inverted(c)
    u, s, vt = torch.linalg.svd(w @ damped, full_matrices=False)
    some = slice(None, rank) if part == "most" else slice(len(s) - rank, None)
    root, signs = (s[some] / scale).sqrt(), signs_of(vt[some])
    return without(w, root[:, None] * (signs * vt[some] @ inverse), u[:, some] * signs.T * root, scale)


def _inverted(c: Tensor) -> tuple[Tensor, Tensor]:
    """C with as much on its diagonal as makes it invertible, a hundredth of the mean there and twice that from then; its inverse."""
    eye, mean, damping = torch.eye(len(c), dtype=c.dtype, device=c.device), c.diagonal().mean(), 0.01
    if not (mean.isfinite() and mean > 0):
        raise ValueError("it takes nothing but zeros, or what is not finite")
    while True:
        damped = c + eye * mean * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            return damped, inverse
        damping *= 2


class Principal(NamedTuple):
    """What a layer takes for so many `tokens`: the `shares` of its variance along its principal components, the largest first, and
    these components, `rows` (k, n)."""

    tokens: float
    shares: Tensor
    rows: Tensor


def principal(sums: Tensor, most: int, dtype: torch.dtype) -> Principal:
    """Returns the first principal components of what a layer takes, `most` or as many as there are, on the host. `sums`
    (n + 1, n + 1): of [x, 1]^T [x, 1] over tokens' x (n,), whose numbers are known as well as `dtype` tells. Raises ValueError where
    there is nothing."""
    count, total, squares = sums[-1, -1].item(), sums[-1, :-1], sums[:-1, :-1]
    if not (count > 0 and squares.isfinite().all()):
        raise ValueError("it takes nothing, or what is not finite")
    mean = wide(total) / count
    values, vectors = torch.linalg.eigh(wide(squares) - count * torch.outer(mean, mean))
    there = int((values > len(values) * torch.finfo(dtype).eps * values[-1]).sum())
    rows = vectors.flip(1)[:, : min(most, there)].T
    shares = values.flip(0)[: len(rows)] / values.clamp(min=0).sum()
    return Principal(count, shares.cpu(), (rows * signs_of(rows)).to("cpu", dtype))


def shared_out(shares: Sequence[Tensor], rank: int, most: int) -> list[int]:
    """Returns the rank of each layer: of the directions in which layers take what varies, those of the largest shares, `rank` for each
    layer on the mean, and of one layer at most `most`. `shares`: of a layer's variance, direction by direction, the largest first; as
    much in two layers, as where these take the same, goes to the one before."""
    # To 2^-20: what is the same has been added up in other orders.
    told = [(share, layer) for layer, own in enumerate(shares) for share in _coarse(own[:most])]
    chosen = sorted(told, key=lambda one: (-one[0], one[1]))[: rank * len(shares)]
    return [sum(layer == of for _, of in chosen) for layer in range(len(shares))]


def _coarse(numbers: Tensor) -> list[float]:
    mantissas, exponents = torch.frexp(numbers.double())
    return torch.ldexp((mantissas * 2**20).round(), exponents).tolist()


def signs_of(rows: Tensor) -> Tensor:
    """Returns the sign of the largest number of each row, (rows, 1): of a direction and its opposite, rounding would choose
    (scikit-learn's `svd_flip`)."""
    return rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


class Quantised(NamedTuple):
    """LQ-LoRA's parts: bytes of R, A, B, and the error that is left, over the norm that W has."""

    packed: Tensor
    a: Tensor
    b: Tensor
    error: float


def lq(
    w: Tensor, form: RowForm, rank: int, scale: float, key: int, importance: Tensor | None = None, most: int = 100
) -> Quantised:
    """Finds R of `form`, A and B in turn, `most` times or until the error grows. `importance`: of each of W's numbers, F (m, n), by
    which squares of errors are weighed, such as squared gradients; `key`: of the stream that sketches are drawn from.

        s B A  <-  the best of rank r of D_1 (W - R) D_2, divided by D_1 and D_2        R  <-  round(W - s B A)
        error   =  |sqrt(F) (W - s B A - R)|

    with D_1 and D_2 the square roots of the means of F along rows and columns; the last turn stands, as in the authors' code."""
    w = wide(w)
    weights = Weights.of(w, importance)
    r, last = torch.zeros_like(w), float("inf")
    for _ in range(most):
        b, a = weights.halves(w - r, rank, key)
        remaining = w - b @ a
        packed, r = _rounded(remaining, form)
        error = weights.norm(remaining - r)
        if error > last:
            break
        last = error
    root = scale**0.5
    return Quantised(packed, a / root, b / root, error / max(weights.norm(w), 1e-30))


def first_errors(
    w: Tensor, forms: Sequence[RowForm], rank: int, key: int, importance: Tensor | None = None
) -> list[float]:
    """Returns the square of the error that the first turn of `lq` leaves in each form."""
    w = wide(w)
    weights = Weights.of(w, importance)
    b, a = weights.halves(w, rank, key)
    remaining = w - b @ a
    return [weights.mean * weights.norm(remaining - _rounded(remaining, form)[1]) ** 2 for form in forms]


class Weights(NamedTuple):
    """How much errors of a matrix (m, n) count: `roots`, of F over its `mean`, so that nothing is too small for 32 bits (None: all
    alike), `rows` (m, 1) and `columns` (1, n), the roots of its means."""

    mean: float
    roots: Tensor | None
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(w: Tensor, importance: Tensor | None) -> "Weights":
        """Returns those of F (m, n). A row or column that counts nothing counts as much as rounding can tell of the largest. Raises
        ValueError where nothing counts, or what does is not finite."""
        if importance is None:
            return Weights(1.0, None, w.new_ones(w.size(0), 1), w.new_ones(1, w.size(1)))
        mean = importance.mean(dtype=torch.float64).item()
        if not (math.isfinite(mean) and mean > 0):
            raise ValueError("its gradients are zero, or not finite")
        f, least = (importance / mean).to(w), torch.finfo(w.dtype).eps
        rows, columns = (means.clamp(min=least * means.max().item()) for means in (f.mean(1)[:, None], f.mean(0)[None]))
        return Weights(mean, f.sqrt(), rows.sqrt(), columns.sqrt())

    def halves(self, x: Tensor, rank: int, key: int) -> tuple[Tensor, Tensor]:
        """Returns (m, r) and (r, n), whose product is as near to x as rank r can be, where rows and columns count."""
        b, a = _halves(self.rows * x * self.columns, rank, key)
        return b / self.rows, a / self.columns

    def norm(self, errors: Tensor) -> float:
        """Returns the size of errors, each as it counts."""
        return (errors if self.roots is None else self.roots * errors).norm().item()


def _rounded(x: Tensor, form: RowForm) -> tuple[Tensor, Tensor]:
    """The bytes of a whole matrix, and the numbers behind them."""
    packed = encode_rows(x, form, least_scale(x, form) if form.scales == "whole" else None)
    return packed, decode_rows(packed, x.size(1), form, x.dtype)


def _halves(x: Tensor, rank: int, key: int) -> tuple[Tensor, Tensor]:
    """(m, r) and (r, n), whose product is the best of rank r; of a large matrix by a sketch (Halko et al., *Finding Structure with
    Randomness*)."""
    width, narrow = rank + OVERSAMPLED, min(x.shape)
    if narrow < WHOLE * width:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
    else:
        drawn = normal(key, 0, x.size(1) * width, x.device).view(x.size(1), width).to(x.dtype)
        q = torch.linalg.qr(x @ drawn).Q
        for _ in range(POWERS):
            q = torch.linalg.qr(x @ torch.linalg.qr(x.T @ q).Q).Q
        u, s, vt = torch.linalg.svd(q.T @ x, full_matrices=False)
        u = q @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def without(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Parts:
    """Takes s B A out of W."""
    return Parts(w - scale * (b @ a), a, b)
