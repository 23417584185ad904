"""N:M sparsity: of every m neighbours in a matrix the n largest in magnitude; and the linear layer of such a matrix.

    prune(W)_j = W_j    if at least m - n neighbours k of its group are behind it        0 otherwise
    k is behind j       where |W_k| < |W_j|, or |W_k| = |W_j| and k > j (the earlier one is kept)

Groups lie along a row (dim 1: of a row, 2:4 keeps two in every four columns) or along a column (dim 0). NaN is above all.
The layer multiplies by the pruned matrix, and the dense one learns (straight through):

    y = x prune(W, dim 1)^T + b        dW = dy^T x        db = sum of dy

    backward "row"       dx = dy prune(W, dim 1)    SR-STE (Zhou et al., *Learning N:M Fine-grained Structured Sparse Neural
                                                    Networks From Scratch*), which also adds s (W - prune(W)) to dW
    backward "column"    dx = dy prune(W, dim 0)    BDWP (Fang et al., *Efficient N:M Sparse DNN Training Using Algorithm,
                                                    Architecture, and Dataflow Co-Design*): both products are N:M

The references compare |W| as whole numbers, which their bits are in the order of. Where a group is a machine word of
bytes (m = 2, 4, 8 along a row) every number is compared with the one d places on for d < m, in one pass over memory; the
answers are the bytes of the group's word, and the word adds up all its places at once. Elsewhere every pair of places is
compared for all groups.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import device_portions, row_portions
from rowwise.kernels.semi_structured import semi_structured_linear, sparsity_problem

Backward = Literal["row", "column"]

ELEMENTS = 1 << 18  # of a portion, a thread: most temporaries are bytes, and a portion is some twenty operators
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def nm_problem(shape: tuple[int, ...], n: int, m: int, backward: Backward, semi_structured: bool = False) -> str | None:
    """Says why a layer with a weight of that shape (out, in) cannot be n:m, or None: every group must be whole. Of
    `semi_structured` only n and m are looked at; the rest is a matter of devices."""
    if backward not in ("row", "column"):
        return f"backward={backward!r}: possible are 'row' and 'column'"
    if semi_structured and (problem := sparsity_problem(n, m)):
        return f"semi_structured: {problem}"
    return _groups_problem(shape, n, m, (1, 0) if backward == "column" else (1,))


def _groups_problem(shape: tuple[int, ...], n: int, m: int, dims: tuple[int, ...]) -> str | None:
    if not 1 <= n <= m:
        return f"sparsity {n}:{m}: of m neighbours n are kept, so that 1 <= n <= m"
    if len(shape) != 2:
        return f"the shape {tuple(shape)} is not a matrix's: n:m sparsity is of matrices"
    for dim, line in zip((1, 0), ("row", "column"), strict=True):
        if dim in dims and shape[dim] % m:
            return (
                f"a {line} of {tuple(shape)} has {shape[dim]} elements, no whole number of groups of {m}; "
                f"give another m, or leave this matrix dense"
            )
    return None


def prune_nm(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Returns w (out, in) with the n largest of every m neighbours along `dim`, the others exactly 0; contiguous, a copy.

    Any floating dtype of 16 to 64 bits, bit for bit the same on every device. Gives no gradient: see `nm_linear`. Raises
    ValueError where `dim` is no whole number of groups. Communicates nothing.
    """
    if dim not in (0, 1):
        raise ValueError(f"dim={dim}: groups lie along the columns, 0, or along the rows, 1")
    if problem := _groups_problem(w.shape, n, m, (dim,)):
        raise ValueError(problem)
    return _prune(w, n, m, dim)


# An operator of its own: torch.compile leaves its portions and its choice of a kernel alone.
@torch.library.custom_op("rowwise::prune_nm", mutates_args=())
def _prune(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    if use_triton(w.device):
        from rowwise.kernels.nm_triton import prune_nm_triton

        return prune_nm_triton(w, n, m, dim)
    return prune_nm_reference(w, n, m, dim)


@_prune.register_fake
def _(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def prune_nm_reference(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Computes `prune_nm` in plain torch."""
    groups = _groups(w, m, dim)
    out = torch.empty_like(groups)
    for part in _portions(groups):
        torch.mul(groups[part], _kept(groups[part], n), out=out[part])
    return out.view(w.dtype).view(w.shape)


def nm_mask(w: Tensor, n: int, m: int) -> Tensor:
    """Says which elements of w (rows, in) are kept along the rows: bool (rows, in). Row-local; there may be no rows. Raises
    ValueError as `prune_nm` does. Communicates nothing."""
    if problem := _groups_problem(w.shape, n, m, (1,)):
        raise ValueError(problem)
    if use_triton(w.device):
        from rowwise.kernels.nm_triton import nm_mask_triton

        return nm_mask_triton(w, n, m)
    groups = _groups(w, m, 1)
    mask = torch.empty(groups.shape, dtype=torch.int8, device=w.device)
    for part in _portions(groups):
        mask[part] = _kept(groups[part], n)
    return mask.view(torch.bool).view(w.shape)


@torch.no_grad()
def decay_pruned_(grad: Tensor, w: Tensor, n: int, m: int, strength: float, dtype: torch.dtype | None = None) -> None:
    """Adds SR-STE's decay: grad += strength (w - prune(w)), groups along the row, for a rank's rows of both (rows, in).

    `dtype` is the one in which the layer multiplies, if not w's own: rounding makes ties, so that it decides what is
    pruned. Communicates nothing.
    """
    for rows in device_portions(w, w.size(1)):
        mask = nm_mask(w[rows] if dtype is None else w[rows].to(dtype), n, m)
        grad[rows].add_(w[rows].masked_fill(mask, 0), alpha=strength)


def _groups(w: Tensor, m: int, dim: int) -> Tensor:
    """The bits of w (out, in) as whole numbers (groups, m, what lies between the neighbours of a group)."""
    inner = 1 if dim == 1 else w.size(1)
    return w.contiguous().view(INTEGERS[w.itemsize]).view(w.numel() // max(1, m * inner), m, inner)


def _portions(groups: Tensor) -> Iterator[slice]:
    return row_portions(groups.size(0), groups.size(1) * groups.size(2), ELEMENTS * torch.get_num_threads())


def _kept(groups: Tensor, n: int) -> Tensor:
    """1 where an element is among the n largest of its group and 0 elsewhere: int8, of the same shape."""
    key = groups & torch.iinfo(groups.dtype).max  # without the sign, in the order of |w|, NaN above all
    m, inner = groups.shape[1:]
    return (_kept_by_words if inner == 1 and m in INTEGERS else _kept_by_pairs)(key, n)


def _kept_by_pairs(key: Tensor, n: int) -> Tensor:
    m = key.size(1)
    # Of place j: those behind it, less the j places before it that would be behind it too.
    behind = torch.zeros(key.shape, dtype=torch.int8 if m < 128 else torch.int32, device=key.device)
    for j in range(m):
        for k in range(j + 1, m):
            first = (key[:, j] >= key[:, k]).view(torch.int8)
            behind[:, j] += first
            behind[:, k] -= first
    enough = torch.arange(m - n, -n, -1, device=key.device)[:, None]
    return (behind >= enough.to(behind.dtype)).view(torch.int8)


def _kept_by_words(key: Tensor, n: int) -> Tensor:
    """A byte a place: 64 - (m - n) + how many are behind it, so that bit 6 says whether they are enough. No byte
    overflows or borrows: place j starts with the j before it, and only those are taken from it."""
    m, flat = key.size(1), key.view(-1)
    word, ones = INTEGERS[m], _word([1] * m)
    behind = torch.full((key.size(0),), _word([64 - (m - n) + j for j in range(m)]), dtype=word, device=key.device)
    ahead = torch.empty(len(flat), dtype=torch.bool, device=key.device)
    for d in range(1, m):
        torch.ge(flat[:-d], flat[d:], out=ahead[:-d])
        first = ahead.view(word) & _word([1] * (m - d))  # the last d places have no neighbour d places on
        behind += first
        behind -= first << (8 * d)
    return ((behind >> 6) & ones).view(torch.int8).view(key.shape)


def _word(of: list[int]) -> int:
    return int.from_bytes(bytes(of), "little")


def nm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    backward: Backward,
    semi_structured: bool = False,
) -> Tensor:
    """Computes y (..., out) of x (..., in), weight (out, in) and bias (out,), all of one dtype; the formulas stand above.

    Keeps x and the dense weight for the backward, which prunes again: no pruned copy outlives its product.
    `semi_structured` multiplies on 2:4 hardware (`kernels/semi_structured.py`). A TorchFunctionMode sees the call, with
    all arguments by position. Raises ValueError where groups are not whole. Communicates nothing.
    """
    if has_torch_function((x, weight, bias)):
        how = (x, weight, bias, n, m, backward, semi_structured)
        return handle_torch_function(nm_linear, (x, weight, bias), *how)
    if problem := nm_problem(weight.shape, n, m, backward, semi_structured):
        raise ValueError(problem)
    return _NMLinear.apply(x, weight, bias, n, m, backward, semi_structured)


def nm_input_gradient(
    dy: Tensor, weight: Tensor, n: int, m: int, backward: Backward, semi_structured: bool = False
) -> Tensor:
    """Computes dx (..., in) of `nm_linear` from dy (..., out) and the dense weight."""
    if backward == "row":  # its transpose has no groups along the rows: a dense product, on any hardware
        return dy @ prune_nm(weight, n, m, dim=1)
    pruned = prune_nm(weight, n, m, dim=0)
    return semi_structured_linear(dy, pruned.t().contiguous()) if semi_structured else dy @ pruned


class _NMLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.how = how
        n, m, _, semi_structured = how
        pruned = prune_nm(weight, n, m, dim=1)
        return semi_structured_linear(x, pruned, bias) if semi_structured else F.linear(x, pruned, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.size(-1))
        dx = nm_input_gradient(dy, weight, *ctx.how) if ctx.needs_input_grad[0] else None
        dw = rows.t() @ x.reshape(-1, x.size(-1)) if ctx.needs_input_grad[1] else None
        db = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None, None
