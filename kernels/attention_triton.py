"""The Triton form of attention whose scores are capped; the formulas stand in `rowwise.kernels.attention` and `logit_form`.

Areas lie one behind the other, as in `rowwise.kernels.attention_packed`. A program takes some queries of one area and one head and
goes through the keys that they see, or some keys and one key head and goes through the queries of all heads that see them, so that
no two programs write one number: nothing is added up by atomics, whose order would change the last bit.

Scores, sums and what is exponentiated are in float32; products take weights in the dtype of queries, as FlashAttention's do. Heads
are filled up with zeros to a power of two. Shapes as there: q (N, H, E), k and v (M, K, E), lse (H, N).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowwise.kernels.attention_block import Attended, Gradients
from rowwise.kernels.attention_packed import Packing
from rowwise.kernels.logit_form import LogitForm
from rowwise.kernels.logit_form_triton import formed, sloped
from rowwise.kernels.rounding_triton import rounded_to

SIDE = 64  # queries and keys of a tile; half where a row is so long that a program's tiles would not fit into shared memory


@triton.jit
def bounds(q_begins, k_begins, area):
    """Reads where the queries of an area begin and end, and where its keys do."""
    q0, q1 = tl.load(q_begins + area), tl.load(q_begins + area + 1)
    return q0, q1, tl.load(k_begins + area), tl.load(k_begins + area + 1)


@triton.jit
def multiplied(a, b, TF32: tl.constexpr):
    """Multiplies tiles, with sums in float32."""
    return tl.dot(a, b, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def rows_of(t, row, end, head, heads, size, SIZE: tl.constexpr, WIDEN: tl.constexpr):
    """Reads rows of one head, (rows, SIZE), zeros from `end` on and beyond the size of a head."""
    column = tl.arange(0, SIZE)
    place = (row.to(tl.int64)[:, None] * heads + head) * size + column[None, :]
    found = tl.load(t + place, mask=(row < end)[:, None] & (column < size)[None, :], other=0.0)
    return found.to(tl.float32) if WIDEN else found


@triton.jit
def put_rows(t, value, row, end, head, heads, size, SIZE: tl.constexpr):
    """Writes rows of one head, (rows, SIZE), rounded to the dtype of `t`."""
    column = tl.arange(0, SIZE)
    place = (row.to(tl.int64)[:, None] * heads + head) * size + column[None, :]
    inside = (row < end)[:, None] & (column < size)[None, :]
    tl.store(t + place, rounded_to(value, t.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, WIDEN: tl.constexpr, TF32: tl.constexpr):
    """Multiplies tiles, `a` float32 rounded to the dtype of `b`, with sums in float32."""
    return multiplied(a if WIDEN else rounded_to(a, b.dtype), b, TF32)


@triton.jit
def seen_by(row, key, q0, q1, k0, k1, CAUSAL: tl.constexpr):
    """Says which keys of a tile these queries see, (rows, keys)."""
    seen = (row < q1)[:, None] & (key < k1)[None, :]
    return seen & (key[None, :] - k0 <= row[:, None] - q0) if CAUSAL else seen


@triton.jit
def scores(q, k, scale, cap, TF32: tl.constexpr):
    """Computes the scores of a tile."""
    return formed(multiplied(q, tl.trans(k), TF32), scale, cap, True)


@triton.jit
def weights_and_slopes(q, d_out, lse, shift, k, v, seen, scale, cap, TF32: tl.constexpr):
    """Computes the weights P of a tile, and the gradients of its products: both 0 where a key is not seen."""
    z = scores(q, k, scale, cap, TF32)
    p = tl.exp(tl.where(seen, z - lse[:, None], -float("inf")))
    d_p = multiplied(d_out, tl.trans(v), TF32)
    return p, sloped(p * (d_p - shift[:, None]), z, scale, cap, True)


@triton.jit
def attend_kernel(
    q, k, v, out, lse, q_begins, k_begins, total, heads, groups, size, scale, cap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, TF32: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Writes out and lse of ROWS queries of one area and one head."""
    first, area, head = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    q0, q1, k0, k1 = bounds(q_begins, k_begins, area)
    if first < q1 - q0:
        row, group = q0 + first + tl.arange(0, ROWS), head // (heads // groups)
        some_q = rows_of(q, row, q1, head, heads, size, SIZE, WIDEN)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        weight, summed = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, SIZE], tl.float32)
        for key0 in range(k0, tl.minimum(k1, k0 + first + ROWS) if CAUSAL else k1, KEYS):
            key = key0 + tl.arange(0, KEYS)
            some_k = rows_of(k, key, k1, group, groups, size, SIZE, WIDEN)
            some_v = rows_of(v, key, k1, group, groups, size, SIZE, WIDEN)
            # Rows behind the last see what it sees, so that none has seen nothing: that would be 0 / 0.
            seen = seen_by(row, key, q0, q0 + first + ROWS, k0, k1, CAUSAL)
            z = tl.where(seen, scores(some_q, some_k, scale, cap, TF32), -float("inf"))
            higher = tl.maximum(top, tl.max(z, axis=1))
            p, fade = tl.exp(z - higher[:, None]), tl.exp(top - higher)
            summed = summed * fade[:, None] + product(p, some_v, WIDEN, TF32)
            weight, top = weight * fade + tl.sum(p, axis=1), higher
        put_rows(out, summed / weight[:, None], row, q1, head, heads, size, SIZE)
        tl.store(lse + head * total + row, top + tl.log(weight), mask=row < q1)


@triton.jit
def query_gradient_kernel(
    d_out, q, k, v, out, lse, shift, d_q, q_begins, k_begins, total, heads, groups, size, scale, cap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, TF32: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of ROWS queries of one area and one head, and rowsum(dO out) into `shift` (H, N)."""
    first, area, head = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    q0, q1, k0, k1 = bounds(q_begins, k_begins, area)
    if first < q1 - q0:
        row, group = q0 + first + tl.arange(0, ROWS), head // (heads // groups)
        some_q = rows_of(q, row, q1, head, heads, size, SIZE, WIDEN)
        some_d = rows_of(d_out, row, q1, head, heads, size, SIZE, WIDEN)
        place = head * total + row
        lse_here = tl.load(lse + place, mask=row < q1, other=0.0)
        some_out = rows_of(out, row, q1, head, heads, size, SIZE, WIDEN)
        shift_here = tl.sum(some_d.to(tl.float32) * some_out.to(tl.float32), axis=1)
        tl.store(shift + place, shift_here, mask=row < q1)
        summed = tl.zeros([ROWS, SIZE], tl.float32)
        for key0 in range(k0, tl.minimum(k1, k0 + first + ROWS) if CAUSAL else k1, KEYS):
            key = key0 + tl.arange(0, KEYS)
            some_k = rows_of(k, key, k1, group, groups, size, SIZE, WIDEN)
            some_v = rows_of(v, key, k1, group, groups, size, SIZE, WIDEN)
            seen = seen_by(row, key, q0, q1, k0, k1, CAUSAL)
            _, d_z = weights_and_slopes(some_q, some_d, lse_here, shift_here, some_k, some_v, seen, scale, cap, TF32)
            summed += product(d_z, some_k, WIDEN, TF32)
        put_rows(d_q, summed, row, q1, head, heads, size, SIZE)


@triton.jit
def key_gradient_kernel(
    d_out, q, k, v, lse, shift, d_k, d_v, q_begins, k_begins, total, heads, groups, size, scale, cap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, CAUSAL: tl.constexpr, TF32: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of KEYS keys and values of one area and one key head, over the queries of all heads that look at it.
    `shift` is what the gradients of queries wrote."""
    first, area, group = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    q0, q1, k0, k1 = bounds(q_begins, k_begins, area)
    if first < k1 - k0:
        key, shared = k0 + first + tl.arange(0, KEYS), heads // groups
        some_k = rows_of(k, key, k1, group, groups, size, SIZE, WIDEN)
        some_v = rows_of(v, key, k1, group, groups, size, SIZE, WIDEN)
        of_k, of_v = tl.zeros([KEYS, SIZE], tl.float32), tl.zeros([KEYS, SIZE], tl.float32)
        for head in range(group * shared, (group + 1) * shared):
            for row0 in range(q0 + first if CAUSAL else q0, q1, ROWS):
                row = row0 + tl.arange(0, ROWS)
                some_q = rows_of(q, row, q1, head, heads, size, SIZE, WIDEN)
                some_d = rows_of(d_out, row, q1, head, heads, size, SIZE, WIDEN)
                place = head * total + row
                lse_here = tl.load(lse + place, mask=row < q1, other=0.0)
                shift_here = tl.load(shift + place, mask=row < q1, other=0.0)
                seen = seen_by(row, key, q0, q1, k0, k1, CAUSAL)
                p, d_z = weights_and_slopes(
                    some_q, some_d, lse_here, shift_here, some_k, some_v, seen, scale, cap, TF32
                )
                of_v += product(tl.trans(p), some_d, WIDEN, TF32)
                of_k += product(tl.trans(d_z), some_q, WIDEN, TF32)
        put_rows(d_k, of_k, key, k1, group, groups, size, SIZE)
        put_rows(d_v, of_v, key, k1, group, groups, size, SIZE)


def attend_triton(q: Tensor, k: Tensor, v: Tensor, packing: Packing, form: LogitForm) -> tuple[Tensor, Tensor]:
    """Computes out (N, H, E) in the dtype of `q`, and lse (H, N) in float32, of gathered rows."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)
    shape = _shape(q, k, packing, form)
    grid = (triton.cdiv(max(packing.q_lengths), shape["ROWS"]), len(packing.q_lengths), q.size(1))
    attend_kernel[grid](q, k, v, out, lse, packing.q_begins, packing.k_begins, **shape)
    return out, lse


def attend_backward_triton(d_out: Tensor, attended: Attended, packing: Packing, form: LogitForm) -> Gradients:
    """Returns what these areas give of the gradients, of gathered rows."""
    d_out, q, k, v, out, lse = (t.contiguous() for t in (d_out, *attended))
    d_q, d_k, d_v, shift = (torch.empty_like(t) for t in (q, k, v, lse))
    begins, shape, areas = (packing.q_begins, packing.k_begins), _shape(q, k, packing, form), len(packing.q_lengths)
    of_queries = (triton.cdiv(max(packing.q_lengths), shape["ROWS"]), areas, q.size(1))
    query_gradient_kernel[of_queries](d_out, q, k, v, out, lse, shift, d_q, *begins, **shape)
    of_keys = (triton.cdiv(max(packing.k_lengths), shape["KEYS"]), areas, k.size(1))
    key_gradient_kernel[of_keys](d_out, q, k, v, lse, shift, d_k, d_v, *begins, **shape)
    return d_q, d_k, d_v


def _shape(q: Tensor, k: Tensor, packing: Packing, form: LogitForm) -> dict[str, Any]:
    """How tiles are made. Triton's interpreter takes bfloat16 for whole numbers in a product, so there it is widened."""
    total, heads, size = q.shape
    filled = max(16, triton.next_power_of_2(size))
    side = SIDE if filled * q.itemsize <= 256 else SIDE // 2
    numbers = {"total": total, "heads": heads, "groups": k.size(1), "size": size, "scale": form.scale, "cap": form.cap}
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    widen = triton.knobs.runtime.interpret and q.dtype == torch.bfloat16
    tile = {"ROWS": side, "KEYS": side, "SIZE": filled, "CAUSAL": packing.causal, "TF32": tf32, "WIDEN": widen}
    return numbers | tile | {"num_warps": 8 if filled > 128 else 4, "num_stages": 2}
