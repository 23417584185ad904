"""Whether the weights of a run are still numbers: asked when they are saved and when a step has no gradient, not at every step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rowwise.kernels.rows import local
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank


class NotFinite(FloatingPointError):
    """Weights of a run are NaN or infinite."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The parameters, of those of `tensors` that are, whose rows on this rank are not all finite. Copies none of them."""
    weights = {name: local(tensor) for name, tensor in tensors.items() if name.startswith("model.")}
    return [
        name.removeprefix("model.")
        for name, rows in weights.items()
        if rows.numel() and not torch.isfinite(torch.stack(rows.aminmax())).all()
    ]


def of_any_rank(names: list[str], mesh: Mesh) -> list[str]:
    """What any rank named. One message of a few names a rank, over `mesh.save_group`."""
    return sorted({name for part in from_every_rank(names, mesh.save_group) for name in part})


def told(names: list[str]) -> str:
    """Such as: weights are not finite (embed.weight and 3 more)."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"weights are not finite ({names[0]}{more})"
