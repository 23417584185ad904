"""What is used of DTensor (torch.distributed.tensor) beyond what torch documents: all of it is here.

`compute_local_shape_and_global_offset`     the row at which a rank's rows start: nothing documented says it
`_local_tensor`                             the rows without an operation, which a dispatch mode would count
`_spec`, `DTensorSpec`, `TensorMeta`        a tensor laid out as another is, not on the device of its mesh, to which
                                            `DTensor.from_local` would copy it
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rowwise.kernels.later import Later

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_tensors = Later("torch.distributed.tensor")
_places = Later("torch.distributed.tensor._utils")
_specs = Later("torch.distributed.tensor._dtensor_spec")


def offset_of(tensor: "DTensor") -> tuple[int, ...]:
    """Gives the logical index of the first element that this rank holds."""
    return _places.compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def rows_of(tensor: Tensor) -> Tensor:
    """Gives this rank's rows of a tensor as `kernels.rows.local` does, but without an operation."""
    return tensor._local_tensor if isinstance(tensor, _tensors.DTensor) else tensor


def laid_out_as(tensor: "DTensor", rows: Tensor) -> "DTensor":
    """Makes a tensor of which `rows` are this rank's, split as `tensor` is; the rows stay on their device."""
    return _tensors.DTensor(rows, tensor._spec, requires_grad=False)


def split_as(tensor: "DTensor", rows: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> "DTensor":
    """Makes a tensor of another shape of which `rows` are this rank's, split over the ranks that `tensor` is split over; the rows stay
    on their device."""
    meta = _specs.TensorMeta(shape, stride, rows.dtype)
    spec = _specs.DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta)
    return _tensors.DTensor(rows, spec, requires_grad=False)
