"""Norms of every parameter that learns, of its gradient and of its update, every `log.norms_every` steps, in the record of the step.

    parameter_norms, gradient_norms, update_norms      {parameter: the 2-norm of the logical tensor}

Parameters are as they are after the step; gradients as they are before clipping, so that the sum of their squares is that of
`grad_norm`; an update is all that changed a parameter in the step, weight decay included. Where the gradient is no number it
has no norms; where no update was made, its norms are zero.
"""

import torch
import torch.distributed as dist
from torch import nn

from rowwise.kernels.rows import local
from rowwise.kernels.spec import learning
from rowwise.kernels.wide import wide
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.shard import clip_factor
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.step import StepReport

KINDS = ("parameter_norms", "gradient_norms", "update_norms")


class Norms:
    """The norms of one step. Made before it, when it copies this rank's rows of the parameters: as many bytes as those have,
    until the step is over."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        self._before = {name: local(p).clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def measure(
        self, model: nn.Module, report: StepReport, config: TrainConfig, mesh: Mesh
    ) -> dict[str, dict[str, float]]:
        """Returns what the step adds to its record, once it is made and while its gradients are there. One all-reduce of 24 bytes a
        parameter over all ranks, and one more wait for the device."""
        specs = learning(run_specs(config))
        names = list(specs)
        place = {name: number for number, name in enumerate(names)}
        squares = torch.zeros(len(KINDS), len(names), dtype=torch.float64, device=mesh.device)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            now = local(p)
            changed = wide(now) - wide(self._before.pop(name))
            for kind, tensor in enumerate((now, None if p.grad is None else local(p.grad), changed)):
                if tensor is not None and tensor.numel():  # a sum of squares in 16 bits depends on how it is split
                    squares[kind, place[name]] = torch.linalg.vector_norm(wide(tensor)).double().square()
        dist.all_reduce(squares)
        squares /= squares.new_tensor([mesh.views[spec.view].replicas for spec in specs.values()])
        if report.finite:
            squares[1] /= clip_factor(report.grad_norm, config.clip_norm) ** 2
        found = {
            kind: dict(zip(names, row, strict=True)) for kind, row in zip(KINDS, squares.sqrt().tolist(), strict=True)
        }
        return found if report.finite else {kind: norms for kind, norms in found.items() if kind != "gradient_norms"}


def norms_of_next(config: TrainConfig, step: int, model: nn.Module) -> Norms | None:
    """Returns what measures the step after `step`; None where it is not to be."""
    return Norms(model) if config.log.with_norms(step + 1, config.length) else None
