"""What is used of DTensor (torch.distributed.tensor) beyond what torch documents: all of it is here.

`compute_local_shape_and_global_offset`     the row at which a rank's rows start: nothing documented says it
`_local_tensor`                             the rows without an operation, which a dispatch mode would count
`_spec`                                     a tensor laid out as another is, not on that one's device, to which
                                            `DTensor.from_local` would copy it
"""

from typing import TYPE_CHECKING

from torch import Tensor

from rowwise.kernels.later import Later

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_tensors = Later("torch.distributed.tensor")
_places = Later("torch.distributed.tensor._utils")


def offset_of(tensor: "DTensor") -> tuple[int, ...]:
    """Gives the logical index of the first element that this rank holds."""
    return _places.compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def rows_of(tensor: Tensor) -> Tensor:
    """Gives this rank's rows of a tensor as `kernels.rows.local` does, but without an operation."""
    return tensor._local_tensor if isinstance(tensor, _tensors.DTensor) else tensor


def laid_out_as(tensor: "DTensor", rows: Tensor) -> "DTensor":
    """Makes a tensor of which `rows` are this rank's, split as `tensor` is; the rows stay on their device."""
    return _tensors.DTensor(rows, tensor._spec, requires_grad=False)
