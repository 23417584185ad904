"""Linear layers of constant fan-in in condensed form, for inference.

Every row of W (out, in) has k non-zeros (Lasby et al., *Dynamic Sparse Training with Structured Sparsity*, section 4.4):
their values and columns are two matrices (rows, k), without the row pointers and the uneven rows of CSR. Rows that are all
zero (neurons that were ablated) are left out:

    y[b, rows[r]] = sum over j of values[r, j] x[b, columns[r, j]]        0 in the rows that are left out

On the CPU the plain form is what was measured to be fastest of a dozen ways; `benchmarks/condensed.py` has the numbers.
"""

import functools
import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowwise.kernels.dispatch import use_triton
from rowwise.kernels.portions import row_portions
from rowwise.kernels.wide import wide_dtype

MOST_PADDING = 1.5  # times the non-zeros; beyond, the rows are not of one width
_FEW = 16  # vectors: MKL's product with a few columns is faster than sums of rows of x^T, which are shorter than a register
_BAG = 64  # vectors whose sums stay in registers


@dataclass(frozen=True)
class Condensed:
    """values (r, k) and int32 columns (r, k) of the `rows` (int32, ascending) that are not all zero, or of all where it is
    None. `starts`, int32 (out + 1): where in values each row of the matrix begins; one that is left out has none there."""

    values: Tensor
    columns: Tensor
    rows: Tensor | None
    starts: Tensor
    shape: torch.Size

    @functools.cached_property
    def csr(self) -> Tensor:
        """The same numbers in the same memory, as a CSR matrix of torch."""
        return _csr(self, self.values)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out `csr`, which in a copy would have memory of its own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def condensed(values: Tensor, columns: Tensor, rows: Tensor | None, shape: torch.Size) -> Condensed:
    """Returns the condensed matrix (out, in) with these parts. Raises ValueError where they do not fit."""
    live = shape[0] if rows is None else len(rows)
    if values.shape != columns.shape or values.ndim != 2 or len(values) != live:
        raise ValueError(
            f"values are {tuple(values.shape)}, columns {tuple(columns.shape)}, and {live} rows of {tuple(shape)} are not "
            "ablated; all three have one row for each of them, and values and columns one shape"
        )
    for name, index, size in (("columns", columns, shape[1]), ("rows", rows, shape[0])):
        if index is not None and index.numel() and not 0 <= index.min() <= index.max() < size:
            raise ValueError(f"{name} reach from {index.min()} to {index.max()}; possible are 0 to {size - 1}")
    if rows is not None and (rows.diff() <= 0).any():
        raise ValueError("rows do not ascend; sort them, and values and columns with them")
    counts = torch.zeros(shape[0], dtype=torch.int32, device=values.device)
    counts[slice(None) if rows is None else rows.long()] = values.size(1)
    starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return Condensed(values, columns.int(), None if rows is None else rows.int(), starts, shape)


def condense(w: Tensor) -> Condensed:
    """Computes the condensed form of W (out, in). A row with fewer non-zeros than the widest is filled with zeros of its own.

    Raises ValueError where that makes more than MOST_PADDING times the non-zeros.
    """
    counts = w.count_nonzero(dim=1)
    rows = counts.nonzero().view(-1)
    k = int(counts.max()) if len(rows) else 0
    if len(rows) * k > MOST_PADDING * int(counts.sum()):
        raise ValueError(
            f"its rows have from {int(counts[rows].min())} to {k} non-zeros, {counts[rows].double().mean():.1f} on average: "
            f"it is not of constant fan-in, and filled up to {k} it would hold more than {MOST_PADDING} times its non-zeros; "
            "train it with sparsity=srigl, or keep it dense"
        )
    columns = torch.empty(len(rows), k, dtype=torch.int32, device=w.device)
    values = torch.empty(len(rows), k, dtype=w.dtype, device=w.device)
    for part in row_portions(len(rows), w.size(1)):
        dense = w[rows[part]]
        # A stable sort: the columns of non-zeros in order, then as many of zeros as are missing.
        first = (dense == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
        columns[part] = first.int()
        torch.gather(dense, 1, first, out=values[part])
    return condensed(values, columns, None if len(rows) == w.size(0) else rows, w.shape)


def expand(c: Condensed) -> Tensor:
    """Expands to the dense matrix (out, in)."""
    dense = torch.zeros(c.shape, dtype=c.values.dtype, device=c.values.device)
    live = torch.zeros(len(c.values), c.shape[1], dtype=dense.dtype, device=dense.device)
    live.scatter_(1, c.columns.long(), c.values)
    return live if c.rows is None else dense.index_copy_(0, c.rows.long(), live)


def condensed_linear(x: Tensor, c: Condensed) -> Tensor:
    """Multiplies x (..., in) by W^T: (..., out), in the dtype of x, which is that of the values. Sums are in float32 at least.

    Of many vectors the result is laid out by features, as the next such layer reads it. Raises ValueError for other shapes
    and dtypes, and where a gradient would be needed.
    """
    if x.size(-1) != c.shape[1] or x.dtype != c.values.dtype:
        raise ValueError(
            f"the input is {tuple(x.shape)} in {x.dtype}, and the layer has {c.shape[1]} inputs in {c.values.dtype}; "
            "give such an input"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("condensed layers are for inference and have no gradient; call them in torch.inference_mode()")
    # Of one vector and a small layer, every operator here would be a per cent of the time.
    flat = x if x.ndim == 2 else x.reshape(-1, c.shape[1])
    if not flat.numel() or not c.values.numel():
        y = x.new_zeros(len(flat), c.shape[0])
    elif x.is_cuda and x.dtype != torch.float64 and use_triton(x.device):
        from rowwise.kernels.condensed_triton import condensed_linear_triton

        y = condensed_linear_triton(flat, c)
    else:
        y = condensed_linear_reference(flat, c)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], c.shape[0])


def condensed_linear_reference(x: Tensor, c: Condensed) -> Tensor:
    """Computes `condensed_linear` of x (B, in) in plain torch: by MKL as a CSR matrix for one vector or a few, and for many as sums
    of rows of x^T, which FBGEMM keeps in registers."""
    mkl = x.is_cpu and csr_multiplies()
    # MKL's CSR has no 16 bits, and FBGEMM no float64.
    short = x.dtype.itemsize == 2
    if len(x) == 1:
        if not mkl:
            return _gathered(x[0], c)[None]
        return (torch.mv(_csr(c, c.values.float()), x[0].float()).to(x.dtype) if short else torch.mv(c.csr, x[0]))[None]
    if mkl and not short and (len(x) <= _FEW or x.dtype == torch.float64):
        return torch.mm(c.csr, x.t()).t()
    return _bags(x, c)


def _csr(c: Condensed, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(c.starts, c.columns.view(-1), values.view(-1), c.shape, check_invariants=False)


@functools.cache
def csr_multiplies() -> bool:
    """Says whether this torch multiplies CSR matrices by MKL. Not for ARM, for one."""
    if not torch.backends.mkl.is_available():
        return False
    with warnings.catch_warnings():
        # Torch says once in a process that CSR is in beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        index = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), (1, 1), check_invariants=False)
    return True


def _gathered(x: Tensor, c: Condensed) -> Tensor:
    """One vector: gathered and multiplied in portions that stay in cache."""
    wide = wide_dtype(x.dtype)
    x, sums = x.to(wide), torch.empty(len(c.values), dtype=wide, device=x.device)
    for rows in row_portions(*c.values.shape):
        values = c.values[rows].to(wide)
        gathered = x.index_select(0, c.columns[rows].reshape(-1)).view_as(values)
        sums[rows] = torch.linalg.vecdot(gathered, values)
    y = sums if c.rows is None else sums.new_zeros(c.shape[0]).index_copy_(0, c.rows.long(), sums)
    return y.to(c.values.dtype)


def _bags(x: Tensor, c: Condensed) -> Tensor:
    """Many vectors: row r of y^T is the sum of k rows of x^T, each times a value."""
    parts = math.ceil(len(x) / _BAG)  # nearly equal: FBGEMM is slow for a last one of one vector
    sums = [
        F.embedding_bag(
            c.columns.view(-1),
            part.t().contiguous(),
            c.starts,
            mode="sum",
            per_sample_weights=c.values.view(-1),
            include_last_offset=True,
        )
        for part in x.tensor_split(parts)
    ]
    return (sums[0] if parts == 1 else torch.cat(sums, dim=1)).t()
