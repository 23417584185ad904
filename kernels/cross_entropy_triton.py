"""The Triton form of `rowwise.kernels.cross_entropy`; the formulas stand there.

The forward keeps a tile of logits where it is made: a program goes through a segment of the vocabulary for some tokens, and writes
their log-sum-exp over it, which torch puts together: nothing is added up by atomics, whose order would change the last bit. The
backward makes a tile and writes its gradient, in 16 bits where x has them, for the two products behind it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.logit_form import AS_THEY_ARE, LogitForm
from rowwise.kernels.logit_form_triton import formed, sloped
from rowwise.kernels.rounding_triton import rounded_to

ROWS, COLUMNS = 128, 128  # of a tile
SEGMENTS = 16  # of the vocabulary, at most: with 8,192 tokens 1,024 programs


@triton.jit
def logits(
    x,
    w,
    row,
    column,
    tokens,
    words,
    dim,
    scale,
    cap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TF32: tl.constexpr,
    WIDEN: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Computes z (ROWS, COLUMNS) of these tokens and words, of products rounded to the dtype of x, float32; 0 beyond the last."""
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    some, one = (row < tokens)[:, None], (column < words)[None, :]
    for first in range(0, dim, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        a = tl.load(x + row[:, None] * dim + depth[None, :], mask=some & (depth < dim)[None, :], other=0.0)
        b = tl.load(w + column[None, :] * dim + depth[:, None], mask=one & (depth < dim)[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="tf32" if TF32 else "ieee")
    return formed(rounded_to(z, x.dtype.element_ty).to(tl.float32), scale, cap, CAPPED)


@triton.jit
def sum_and_label_kernel(
    x,
    w,
    labels,
    sums,
    at_label,
    tokens,
    words,
    dim,
    tiles,
    scale,
    cap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TF32: tl.constexpr,
    WIDEN: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Writes the log-sum-exp of `tiles` tiles of words, and the logit of the label or 0, for ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1)
    label = tl.load(labels + row, mask=row < tokens, other=-1)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total, found = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(segment * tiles * COLUMNS, tl.minimum((segment + 1) * tiles * COLUMNS, words), COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        z = logits(x, w, row, column, tokens, words, dim, scale, cap, ROWS, COLUMNS, DEPTH, TF32, WIDEN, CAPPED)
        found += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), axis=1)
        z = tl.where((column < words)[None, :], z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        top = higher
    place = segment.to(tl.int64) * tokens + row
    tl.store(sums + place, top + tl.log(total), mask=row < tokens)
    tl.store(at_label + place, found, mask=row < tokens)


@triton.jit
def logit_gradient_kernel(
    x,
    w,
    labels,
    lse,
    g,
    dz,
    tokens,
    words,
    dim,
    scale,
    cap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TF32: tl.constexpr,
    WIDEN: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Writes dz of one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    label = tl.load(labels + row, mask=row < tokens, other=-1)
    sum_of_row = tl.load(lse + row, mask=row < tokens, other=float("inf"))
    z = logits(x, w, row, column, tokens, words, dim, scale, cap, ROWS, COLUMNS, DEPTH, TF32, WIDEN, CAPPED)
    p = tl.exp(z - sum_of_row[:, None]) - tl.where(column[None, :] == label[:, None], 1.0, 0.0)
    p = sloped(p, z, scale, cap, CAPPED)
    inside = (row < tokens)[:, None] & (column < words)[None, :]
    place = dz + row[:, None] * words + column[None, :]
    tl.store(place, rounded_to(p * tl.load(g), dz.dtype.element_ty), mask=inside)


def sum_and_label_triton(
    x_ND: Tensor, w_VD: Tensor, labels_N: Tensor, form: LogitForm = AS_THEY_ARE
) -> tuple[Tensor, Tensor]:
    (tokens, dim), words = x_ND.shape, w_VD.size(0)
    tiles = triton.cdiv(triton.cdiv(words, COLUMNS), SEGMENTS)
    segments = triton.cdiv(triton.cdiv(words, COLUMNS), tiles)
    sums, at_label = torch.empty(2, segments, tokens, dtype=torch.float32, device=x_ND.device)
    if tokens:
        sum_and_label_kernel[(triton.cdiv(tokens, ROWS), segments)](
            *map(_dense, (x_ND, w_VD, labels_N)), sums, at_label, tokens, words, dim, tiles, **_shape(x_ND, form)
        )
    return sums.logsumexp(0), at_label.sum(0)


def logit_gradient_triton(
    x_RD: Tensor, w_CD: Tensor, labels_R: Tensor, lse_R: Tensor, g: Tensor, form: LogitForm = AS_THEY_ARE
) -> Tensor:
    (tokens, dim), words = x_RD.shape, w_CD.size(0)
    dz = x_RD.new_empty(tokens, words)
    if tokens:
        logit_gradient_kernel[(triton.cdiv(tokens, ROWS), triton.cdiv(words, COLUMNS))](
            *map(_dense, (x_RD, w_CD, labels_R, lse_R)), g, dz, tokens, words, dim, **_shape(x_RD, form)
        )
    return dz


def _dense(x: Tensor) -> Tensor:
    return x.contiguous()


def _shape(x: Tensor, form: LogitForm) -> dict[str, float | bool]:
    """How a tile is made of `x`: float32 in TF32 where torch's own products are. Triton's interpreter takes bfloat16 for whole
    numbers in a product, so there it is widened."""
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    z = {"scale": float(form.scale), "cap": float(form.cap or 1.0), "CAPPED": form.cap is not None}
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": 128 // x.itemsize, "num_warps": 8}
    return z | tile | {"TF32": tf32, "WIDEN": triton.knobs.runtime.interpret and x.dtype == torch.bfloat16}
