"""The transposes of matrices that are split by rows, split by rows themselves: rules that want the columns of a wide matrix
together get them by one all-to-all, and no rank ever holds the whole.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.kernels.rows import local, tensors


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
    degree, mine = range(group.size()), group.rank()
    rows, columns = ([splits(shape[dim], len(degree)) for shape in shapes] for dim in (0, 1))
    sent = [x.split(c, dim=1) for x, c in zip(xs, columns, strict=True)]
    received = [[r[rank] * c[mine] for r, c in zip(rows, columns, strict=True)] for rank in degree]
    flat = torch.cat([parts[rank].flatten() for rank in degree for parts in sent])
    into = flat.new_empty(sum(map(sum, received)))
    counts = [sum(parts[rank].numel() for parts in sent) for rank in degree]
    dist.all_to_all_single(into, flat, [sum(sizes) for sizes in received], counts, group=group)
    pieces = iter(into.split([size for sizes in received for size in sizes]))
    turned = [[next(pieces).view(r[rank], c[mine]).T for r, c in zip(rows, columns, strict=True)] for rank in degree]
    return [torch.cat(parts, dim=1) for parts in zip(*turned, strict=True)]


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
    return tensors.DTensor.from_local(
        local_rows, p.device_mesh, p.placements, run_check=False, shape=shape, stride=(columns, 1)
    )


def splits(size: int, degree: int) -> list[int]:
    """Says how many of `size` rows each of `degree` ranks has (the first ones ceil(size / degree), as torch.chunk)."""
    chunk = -(-size // degree)
    return [max(0, min(chunk, size - rank * chunk)) for rank in range(degree)]
