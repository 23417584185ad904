"""One optimizer step: the gradient of the mean loss over every valid token of the global batch, on every layout.

No rank knows the number of valid tokens N of the global batch before all have counted. So each micro-batch's summed
loss is divided by the number of *places* M (a constant of the run), gradients are summed over ranks, and the result is
multiplied by M / N, together with what clipping and the loss scale ask for: exact, in one pass over the shards.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.optim.in_backward import InBackward
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.pipeline import Span
from rowwise.parallel.shard import begin_micro_batch, clip_factor, finish_backward, gradients, squared_norm
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.loss import summed_loss
from rowwise.trainer.pipeline import StagedDecoder


@dataclass(frozen=True)
class StepReport:
    """Of one step, over all ranks. `grad_norm` is before clipping; where it is not finite, there is no usable gradient.
    `stop`: some rank was asked to stop."""

    loss: float
    grad_norm: float
    valid_tokens: int
    stop: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)


def compute_gradients(
    model: nn.Module,
    batches: list[MicroBatch],
    mesh: Mesh,
    zero: int,
    places: int,
    clip_norm: float,
    loss_scale: float = 1.0,
    stop: bool = False,
    trace: list[Span] | None = None,
) -> StepReport:
    """Leaves in every `p.grad` this rank's shard of the (clipped) gradient of the global mean loss.

    `places` is batch.global_size x batch.seq_len. Beside what FSDP2 moves (see `parallel.shard`), one all-reduce of
    four float64 over all ranks, whose result is the only point where the host waits for the device. `trace` takes the
    timeline of a pipeline.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=mesh.device)
    totals[:2] = accumulate(model, batches, mesh.device, zero, loss_scale / places, trace)
    shards = gradients(model)
    totals[2] = squared_norm(shards) / mesh.state_replicas
    totals[3] = float(stop)
    dist.all_reduce(totals)
    loss_sum, tokens, norm_squared, stops = totals.tolist()
    mean = places / max(1.0, tokens) / loss_scale
    norm = math.sqrt(norm_squared) * mean if math.isfinite(norm_squared) else math.inf
    if math.isfinite(norm) and shards:
        torch._foreach_mul_(shards, mean * clip_factor(norm, clip_norm))
    return StepReport(loss_sum / max(1.0, tokens), norm, int(tokens), stops > 0)


def step_in_backward(
    model: nn.Module, batch: MicroBatch, mesh: Mesh, zero: int, optimizer: InBackward, stop: bool = False
) -> StepReport:
    """The whole step of `optim.in_backward`: one micro-batch a rank, and every parameter changed by the end.

    Its gradients must be final as they come, so the valid tokens are counted before the forward: two all-reduces over
    all ranks, of 1 and of 3 float64.
    """
    tokens = (batch.labels != IGNORE).sum().double().to(mesh.device)
    dist.all_reduce(tokens)
    optimizer.begin()
    begin_micro_batch(model, zero, last=True)
    loss, _ = summed_loss(model, batch.to(mesh.device))
    (loss / tokens.clamp_min(1)).backward()
    norm = optimizer.squared_norm().to(mesh.device) / mesh.state_replicas
    totals = torch.stack((loss.detach().double(), norm, torch.full_like(norm, float(stop))))
    dist.all_reduce(totals)
    loss_sum, norm_squared, stops = totals.tolist()
    count = int(tokens)
    norm_of_all = math.sqrt(norm_squared) if math.isfinite(norm_squared) else math.inf
    return StepReport(loss_sum / max(1, count), norm_of_all, count, stops > 0)


def accumulate(
    model: nn.Module,
    batches: list[MicroBatch],
    device: torch.device,
    zero: int,
    scale: float,
    trace: list[Span] | None = None,
) -> Tensor:
    """Forward and backward of every micro-batch. Returns this rank's (loss sum, valid tokens)."""
    if isinstance(model, StagedDecoder):
        return model.accumulate(batches, device, scale, trace)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, 1):
        begin_micro_batch(model, zero, last=number == len(batches))
        loss, tokens = summed_loss(model, batch.to(device))
        (loss * scale).backward()
        totals += torch.stack((loss.detach(), tokens)).double()
    finish_backward(model)
    return totals
