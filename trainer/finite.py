"""Whether the weights of a run are still numbers: asked when they are saved and when a step has no gradient, not at every step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rowwise.kernels.rows import local
from rowwise.optim.lr_schedules import LrRange
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_every_rank
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.state import TrainState
from rowwise.trainer.states import States
from rowwise.trainer.step import StepReport


class NotFinite(FloatingPointError):
    """Weights of a run are NaN or infinite."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the parameters, of those of `tensors` that are, whose rows on this rank are not all finite. Copies none of them."""
    weights = {name: local(tensor) for name, tensor in tensors.items() if name.startswith("model.")}
    return [
        name.removeprefix("model.")
        for name, rows in weights.items()
        if rows.numel() and not torch.isfinite(torch.stack(rows.aminmax())).all()
    ]


def of_any_rank(names: list[str], mesh: Mesh) -> list[str]:
    """Returns what any rank named of its tensors. One message of a few names a rank, over `mesh.save_group`."""
    return sorted({name for part in from_every_rank(names, mesh.save_group) for name in part})


def told(names: list[str]) -> str:
    """Says what is not finite, such as: weights are not finite (embed.weight and 3 more)."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"weights are not finite ({names[0]}{more})"


def require_usable(report: StepReport, config: TrainConfig, state: TrainState, states: States, mesh: Mesh) -> None:
    """Judges a step whose update was not made: a spike is passed over, and where the gradient is no number, fp16 passes it over as
    long as a smaller loss scale may help, and a range test ends by it; anything else stops the run, before it is spoilt where
    that is possible. Says whether the weights were spoilt already, by the update before, whose own loss was a number. Raises
    FloatingPointError."""
    if report.held or isinstance(config.schedule, LrRange):
        return
    if config.precision.name == "fp16" and state.loss_scale.scale > 1:
        return
    spoilt = of_any_rank(not_finite(states.read()), mesh)
    weights = "the weights are finite, as they were before it"
    if config.optim.in_backward:
        weights = "the weights have taken it (optim.in_backward)"
    elif spoilt:
        weights = f"{told(spoilt)} since the update of step {state.step}"
    raise FloatingPointError(
        f"step {state.step + 1}: the gradient norm is not a number (loss {report.loss}); {weights}. "
        "A smaller optim.lr, a longer warm-up or clip_norm may help"
    )
