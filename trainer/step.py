"""One optimizer step: the gradient of the mean loss over every valid token of the global batch, on every layout.

No rank knows the number of valid tokens N of the global batch before all have counted. So each micro-batch's summed
loss is divided by the number of *places* M (a constant of the run), gradients are summed over ranks, and the result is
multiplied by M / N, together with what clipping and the loss scale ask for: exact, in one pass over the shards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rowwise.optim.in_backward import InBackward
from rowwise.optim.shell import Optimizer
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.shard import begin_micro_batch, clip_factor, finish_backward, gradient_squares, gradients
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.loss import mean_loss, summed_loss
from rowwise.trainer.pipeline import StagedDecoder

EVALUATE, SAVE = 1 << 14, 1 << 15  # in one number with a count of ranks


@dataclass(frozen=True)
class RankStatus:
    """What a rank tells all others along with the numbers of a step. `stop`: it was asked to; `damaged`: its data is;
    `digest`: of a sample that every rank reads (see `batches.step_digests`), below 2^20; `evaluate`, `save`: rank 0's clock
    asks for it after this step (see `clock`); `pairs`: its part of those that attention sees in the global batch (see
    `batches.visible_pairs`)."""

    stop: bool = False
    damaged: bool = False
    digest: int = 0
    evaluate: bool = False
    save: bool = False
    pairs: float = 0.0

    def put(self, totals: Tensor) -> None:
        """Into five float64 that are zero; the sums of the first four over up to 8,192 ranks are exact. Only rank 0 may set
        `evaluate` and `save`: they stand in one number with `stop`, above the largest sum of that."""
        asked = self.stop + EVALUATE * self.evaluate + SAVE * self.save
        for place, number in enumerate((asked, self.damaged, self.digest, self.digest**2, self.pairs)):
            if number:
                totals[place] = float(number)


@dataclass(frozen=True)
class StepReport:
    """Of one step, over all ranks. `loss` is NaN where no token is valid: there is no mean. `grad_norm` is before clipping;
    where it is not finite, there is no usable gradient. `stop`: some rank was asked to stop. `sound`: no rank found its
    data damaged, and all read the same. `held`: it is a spike whose update was not made. `evaluate`, `save`: the time has come
    for it. `pairs`: of tokens that attention sees, as far as ranks said."""

    loss: float
    grad_norm: float
    valid_tokens: int
    stop: bool
    sound: bool = True
    held: bool = False
    evaluate: bool = False
    save: bool = False
    pairs: int = 0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)

    @property
    def applied(self) -> bool:
        """Whether the weights have taken it."""
        return self.finite and not self.held


# Whether the update of a step is not to be made, by its numbers, which all ranks have.
Hold = Callable[[StepReport], bool]


def hold_none(report: StepReport) -> bool:
    return False


def compute_gradients(
    model: nn.Module,
    batches: list[MicroBatch],
    mesh: Mesh,
    zero: int,
    places: int,
    clip_norm: float,
    loss_scale: float = 1.0,
    status: RankStatus = RankStatus(),
    trace: Trace | None = None,
    filter_: Callable[[], None] | None = None,
) -> StepReport:
    """Leaves in every `p.grad` this rank's shard of the (clipped) gradient of the global mean loss.

    `places` is batch.global_size x batch.seq_len. `filter_` changes gradients before their norm is taken; `trace` takes the
    timeline of a pipeline. Beside what FSDP2 moves (see `parallel.shard`), one all-reduce of eight float64 over all ranks,
    whose result is the only point where the host waits for the device.
    """
    totals = local_totals(model, batches, mesh, zero, loss_scale / places, status, trace, filter_)
    dist.all_reduce(totals)
    report = read_totals(totals, places, loss_scale)
    if report.finite:
        shards = gradients(model)
        scale_(shards, mean_factor(report.valid_tokens, places, loss_scale))
        scale_(shards, clip_factor(report.grad_norm, clip_norm))
    return report


def step_at_once(
    model: StagedDecoder,
    batches: list[MicroBatch],
    mesh: Mesh,
    zero: int,
    places: int,
    clip_norm: float,
    loss_scale: float,
    optimizer: Optimizer,
    status: RankStatus = RankStatus(),
    trace: Trace | None = None,
    ahead: list[MicroBatch] | None = None,
    hold: Hold = hold_none,
) -> StepReport:
    """`compute_gradients` and the optimizer's step without waiting between them (Qi et al., *Zero Bubble*, section 4):
    each rank steps as soon as its own gradients are there, as if none were clipped, and begins the forwards of `ahead`,
    the next step's micro-batches, while the global norm is on its way; where that was wrong, those are dropped, the step
    is undone, and made again with clipped gradients or not at all. Equal to the ordinary step to the last bit.

    Beside it, one all-reduce of one float64 (the valid tokens) while the micro-batches go through; and a copy of this
    rank's rows of the parameters and their states for as long as the norm is on its way. The host waits for the device
    twice: before the optimizer's step and for the norm.
    """
    tokens = valid_tokens(batches, mesh.device)
    counted = dist.all_reduce(tokens, async_op=True)
    totals = local_totals(model, batches, mesh, zero, loss_scale / places, status, trace)
    own_norm = totals[2].clone()
    summed = dist.all_reduce(totals, async_op=True)
    assert counted is not None and summed is not None
    counted.wait()
    shards, before = gradients(model), None
    norm_squared, count = torch.stack((own_norm, tokens)).tolist()
    if math.isfinite(norm_squared):
        # Every stage of a replica counted the same tokens.
        scale_(shards, mean_factor(int(count) // mesh.stages, places, loss_scale))
        before = optimizer.remember()
        optimizer.step()
    if ahead is not None:
        model.begin(ahead, mesh.device)
    summed.wait()
    report = read_totals(totals, places, loss_scale)
    report = replace(report, held=hold(report))
    factor = clip_factor(report.grad_norm, clip_norm)
    # Something comes between this step and the next, or undoes this one.
    between = report.stop or not report.sound or report.evaluate or report.save
    if not report.applied or factor < 1 or between:
        model.abandon()
    if before is not None and (not report.applied or factor < 1):
        optimizer.undo(before)
    if report.finite and factor < 1:
        scale_(shards, factor)  # also where they are only looked at
        if report.applied:
            optimizer.step()
    return report


def local_totals(
    model: nn.Module,
    batches: list[MicroBatch],
    mesh: Mesh,
    zero: int,
    scale: float,
    status: RankStatus,
    trace: Trace | None,
    filter_: Callable[[], None] | None = None,
) -> Tensor:
    """Forward and backward; then this rank's loss sum, valid tokens, squared norm of its gradient shards, and its status:
    what summed over all ranks says all of a step."""
    totals = torch.zeros(8, dtype=torch.float64, device=mesh.device)
    totals[:2] = accumulate(model, batches, mesh.device, zero, scale, trace)
    if filter_ is not None:
        filter_()
    totals[2] = mesh.share(gradient_squares(model))
    status.put(totals[3:])
    return totals


def read_totals(totals: Tensor, places: int, loss_scale: float) -> StepReport:
    """The report in what `local_totals` gave, summed over all ranks."""
    loss_sum, tokens, norm_squared, *told = totals.tolist()
    finite = math.isfinite(norm_squared)
    norm = math.sqrt(norm_squared) * mean_factor(int(tokens), places, loss_scale) if finite else math.inf
    return StepReport(mean_loss(loss_sum, tokens), norm, int(tokens), **told_by_all(*told))


def told_by_all(asked: float, damaged: float, digests: float, squares: float, pairs: float) -> dict[str, Any]:
    """What a `StepReport` says of the sums of what `RankStatus` puts: whether some rank is asked to stop, whether all read the
    same and nothing damaged, what rank 0's clock asks for, and the pairs. Numbers are equal where the mean of their squares is
    the square of their mean."""
    same = dist.get_world_size() * int(squares) == int(digests) ** 2
    number = int(asked)
    return {
        "stop": number % EVALUATE > 0,
        "sound": same and not damaged,
        "evaluate": bool(number & EVALUATE),
        "save": bool(number & SAVE),
        "pairs": round(pairs),
    }


def mean_factor(tokens: int, places: int, loss_scale: float) -> float:
    """What makes of the sum of scaled losses divided by places, M, the mean over valid tokens, N: M / N / scale."""
    return places / max(1, tokens) / loss_scale


def scale_(shards: list[Tensor], factor: float) -> None:
    """Multiplies each in place."""
    if shards and factor != 1:
        torch._foreach_mul_(shards, factor)


def step_in_backward(
    model: nn.Module, batch: MicroBatch, mesh: Mesh, zero: int, optimizer: InBackward, status: RankStatus = RankStatus()
) -> StepReport:
    """The whole step of `optim.in_backward`: one micro-batch a rank, and every parameter changed by the end.

    Its gradients must be final as they come, so the valid tokens are counted before the forward: two all-reduces over
    all ranks, of 1 and of 7 float64.
    """
    here = batch.to(mesh.device)
    tokens = valid_tokens([here], mesh.device)
    dist.all_reduce(tokens)
    optimizer.begin()
    begin_micro_batch(model, zero, last=True)
    loss, _ = summed_loss(model, here)
    (loss / tokens.clamp_min(1)).backward()
    totals = torch.zeros(8, dtype=torch.float64, device=mesh.device)
    totals[0], totals[1] = loss.detach(), mesh.share(optimizer.squares())
    status.put(totals[2:7])
    dist.all_reduce(totals[:7])
    totals[7] = tokens
    loss_sum, norm_squared, *told, count = totals.tolist()
    norm_of_all = math.sqrt(norm_squared) if math.isfinite(norm_squared) else math.inf
    return StepReport(mean_loss(loss_sum, count), norm_of_all, int(count), **told_by_all(*told))


def valid_tokens(batches: list[MicroBatch], device: torch.device) -> Tensor:
    """How many tokens of these have a label, a float64 scalar on the device."""
    counts = [(batch.labels.to(device, non_blocking=True) != IGNORE).sum() for batch in batches]
    return torch.stack(counts).sum().double()


def accumulate(
    model: nn.Module,
    batches: list[MicroBatch],
    device: torch.device,
    zero: int,
    scale: float,
    trace: Trace | None = None,
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
