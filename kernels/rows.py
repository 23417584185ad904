"""The rows of a logical tensor that this rank holds: every rule and every kernel works on whole rows."""

import math

from torch import Tensor

from rowwise.kernels import torch_dtensor
from rowwise.kernels.later import Later

tensors = Later("torch.distributed.tensor")


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's rows of a tensor."""
    if type(tensor) is Tensor:  # told without importing DTensors, which takes a second
        return tensor
    return tensor.to_local() if isinstance(tensor, tensors.DTensor) else tensor


def row_offset(tensor: Tensor) -> int:
    """Returns the logical row at which this rank's rows start."""
    if not isinstance(tensor, tensors.DTensor):
        return 0
    offset = torch_dtensor.offset_of(tensor)
    # A rank beyond the last row has none, and its offset is not defined.
    return offset[0] if tensor.to_local().numel() else tensor.size(0)


def padded_rows(tensor: Tensor) -> int:
    """Returns the rows of a tensor, made up to as many on each of the ranks that they are split over."""
    if not isinstance(tensor, tensors.DTensor):
        return tensor.size(0)
    split = [dim for dim, place in enumerate(tensor.placements) if isinstance(place, tensors.Shard)]
    degree = math.prod(tensor.device_mesh.size(dim) for dim in split)
    return -(-tensor.size(0) // degree) * degree
