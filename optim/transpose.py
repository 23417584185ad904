"""The transposes of matrices that are split by rows, split by rows themselves: rules that want the columns of a wide matrix
together get them by one all-to-all, and no rank ever holds the whole.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.rows import local, tensors
from rowwise.kernels.torch_dtensor import split_as


def to_tall(xs: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Returns the wide matrices among `xs` transposed (see `transpose`), the others as they are: all have `tall_shape`."""
    return _turn(xs, shapes, [is_wide(shape) for shape in shapes], group)


def from_tall(xs: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Undoes `to_tall`; `shapes` are those that the matrices have lying."""
    return _turn(xs, [tall_shape(shape) for shape in shapes], [is_wide(shape) for shape in shapes], group)


def is_wide(shape: torch.Size) -> bool:
    """Says whether a matrix has more columns than rows."""
    return shape[0] < shape[1]


def tall_shape(shape: torch.Size) -> torch.Size:
    """Returns the shape of a matrix or of its transpose, whichever is not wide."""
    return torch.Size(sorted(shape, reverse=True))


def _turn(
    xs: list[Tensor], shapes: list[torch.Size], which: list[bool], group: dist.ProcessGroup | None
) -> list[Tensor]:
    places = [i for i, turns in enumerate(which) if turns]
    turned = transpose([xs[i] for i in places], [shapes[i] for i in places], group)
    found = dict(enumerate(xs)) | dict(zip(places, turned, strict=True))
    return list(found.values())


def transpose(xs: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Transposes, (m_p, n) -> (n_p, m): this rank's rows of every logical (m, n) matrix become its rows of the transposed one.

    One all-to-all over `group`, the shard axis, for all of them: m n / N numbers a rank each way. What comes back is
    contiguous, and none where `xs` is empty; `transpose(_, [(n, m), ...], group)` is the way back.
    """
    if group is None or not xs:
        return [x.T.contiguous() for x in xs]
    degree, mine = group.size(), group.rank()
    rows, columns = ([splits(shape[dim], degree) for shape in shapes] for dim in (0, 1))
    turned = [x.T.contiguous() for x in xs]
    sent = [sum(t.size(1) * c[rank] for t, c in zip(turned, columns, strict=True)) for rank in range(degree)]
    received = [sum(r[rank] * c[mine] for r, c in zip(rows, columns, strict=True)) for rank in range(degree)]
    flat = _by_rank(turned, columns)
    into = flat.new_empty(sum(received))
    del turned
    dist.all_to_all_single(into, flat, received, sent, group=group)
    return _from_ranks(into, rows, [c[mine] for c in columns])


def _by_rank(ts: list[Tensor], rows: list[list[int]]) -> Tensor:
    """Lays the rows of all matrices one after the other, those for the first rank first: `rows` says how many of each are for each."""
    degree = len(rows[0])
    if all(len(set(each)) == 1 for each in rows):  # a few operations a matrix, however many ranks there are
        return torch.cat([t.view(degree, t.numel() // degree) for t in ts], dim=1).view(-1)
    parts = [t.split(each) for t, each in zip(ts, rows, strict=True)]
    return torch.cat([part[rank].flatten() for rank in range(degree) for part in parts])


def _from_ranks(flat: Tensor, columns: list[list[int]], rows: list[int]) -> list[Tensor]:
    """Puts matrices of so many `rows` together, of which each rank has sent some `columns`."""
    degree = len(columns[0])
    if all(len(set(each)) == 1 for each in columns):
        sizes = [m * each[0] for m, each in zip(rows, columns, strict=True)]
        parts = flat.view(degree, sum(sizes)).split(sizes, dim=1)
        ours = [part.view(degree, m, each[0]) for m, each, part in zip(rows, columns, parts, strict=True)]
        return [part.transpose(0, 1).contiguous().view(part.size(1), degree * part.size(2)) for part in ours]
    sizes = [m * each[rank] for rank in range(degree) for m, each in zip(rows, columns, strict=True)]
    pieces = iter(flat.split(sizes))
    found = [
        [next(pieces).view(m, each[rank]) for m, each in zip(rows, columns, strict=True)] for rank in range(degree)
    ]
    return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def transposed_like(p: Tensor) -> Tensor:
    """Returns a stand-in for the transpose of `p`, split by its own rows as `p` is: what states are shaped after. Without memory."""
    columns, rows = p.shape
    one = local(p).new_empty(())
    if not isinstance(p, tensors.DTensor):
        return one.expand(rows, columns)
    held = rows
    for dim, place in enumerate(p.placements):
        if isinstance(place, tensors.Shard):
            held = splits(held, p.device_mesh.size(dim))[p.device_mesh.get_local_rank(dim)]
    local_rows, shape = one.expand(held, columns), torch.Size((rows, columns))
    return split_as(p, local_rows, shape, (columns, 1))


def splits(size: int, degree: int) -> list[int]:
    """Says how many of `size` rows each of `degree` ranks has (the first ones ceil(size / degree), as torch.chunk)."""
    chunk = -(-size // degree)
    return [max(0, min(chunk, size - rank * chunk)) for rank in range(degree)]
