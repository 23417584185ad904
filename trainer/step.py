"""One optimizer step: the gradient of the mean loss over every valid token of the global batch, on every layout.

No rank knows the number of valid tokens N of the global batch before all have counted. So each micro-batch's summed
loss is divided by the number of *positions* M (a constant of the run), gradients are summed over ranks, and the result is
multiplied by M / N, together with what clipping and the loss scale ask for: exact, in one pass over the shards.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.optim.sparse.build import Sparsity
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.shard import clip_factor, gradient_file, gradient_squares, gradients, scale_
from rowwise.trainer.adapters.allocate import Allocation
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.data.corpus import IGNORE
from rowwise.trainer.engine import Engine
from rowwise.trainer.loss import mean_loss, means_by_source

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
        """Puts the status into five float64 that are zero; the sums of the first four over up to 8,192 ranks are exact. Only rank 0
        may set `evaluate` and `save`: they stand in one number with `stop`, above the largest sum of that."""
        asked = self.stop + EVALUATE * self.evaluate + SAVE * self.save
        for place, number in enumerate((asked, self.damaged, self.digest, self.digest**2, self.pairs)):
            if number:
                totals[place] = float(number)


@dataclass(frozen=True)
class StepInput:
    """What a step takes on this rank. `step`: its number, counted from 1; `batches`: its micro-batches; `positions`: tokens of the
    global batch, valid or not; `clip_norm`: 0 = off; `status`: what this rank tells all; `trace`: where the timeline of a
    pipeline goes; `ahead`: the micro-batches of the next step, where that may be begun."""

    step: int
    batches: list[MicroBatch]
    positions: int
    clip_norm: float = 0.0
    loss_scale: float = 1.0
    status: RankStatus = RankStatus()
    trace: Trace | None = None
    ahead: list[MicroBatch] | None = None


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step, over all ranks. `loss` is NaN where no token is valid: there is no mean. `grad_norm` is before
    clipping; where it is not finite, there is no usable gradient. `stop`: some rank was asked to stop. `sound`: no rank found its
    data damaged, and all read the same. `evaluate`, `save`: the time has come for it. `pairs`: of tokens that attention sees, as far
    as ranks said. `spike`: its score, where it is one; `held`: its update was not made for that. `lr`: the rate of the update.
    `by_source`: the loss of each source of a mixture."""

    loss: float
    grad_norm: float
    valid_tokens: int
    stop: bool
    sound: bool = True
    evaluate: bool = False
    save: bool = False
    pairs: int = 0
    spike: float | None = None
    held: bool = False
    lr: float = 0.0
    by_source: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)

    @property
    def applied(self) -> bool:
        """Whether the weights have taken the update."""
        return self.finite and not self.held


def compute_gradients(
    engine: Engine,
    mesh: Mesh,
    given: StepInput,
    sparsity: Sparsity | None = None,
    allocation: Allocation | None = None,
) -> StepReport:
    """Leaves in every `p.grad` this rank's shard of the (clipped) gradient of the global mean loss.

    `sparsity` and `allocation` change gradients before their norm is taken. Beside what the engine moves (see `parallel.shard`), one
    all-reduce of eight float64 over all ranks, and of two more for each source of a mixture, whose result is the only point where
    the host waits for the device.
    """
    totals = local_totals(engine, mesh, given, sparsity, allocation)
    dist.all_reduce(totals)
    report = read_totals(totals, given)
    if report.finite:
        factors = mean_factor(report.valid_tokens, given), clip_factor(report.grad_norm, given.clip_norm)
        scale_(gradients(engine.model), gradient_file(engine.model), *factors)
    return report


def local_totals(
    engine: Engine,
    mesh: Mesh,
    given: StepInput,
    sparsity: Sparsity | None = None,
    allocation: Allocation | None = None,
) -> Tensor:
    """Runs forward and backward, and returns this rank's loss sum, valid tokens, squared norm of its gradient shards, its status,
    and what it saw of each source: what summed over all ranks says all of a step. An `allocation` takes an all-reduce of a float64."""
    seen = engine.forward_backward(given.batches, given.loss_scale / given.positions, given.trace)
    totals = torch.cat((seen[:2], seen.new_zeros(6), seen[2:]))
    if sparsity is not None:
        sparsity.filter_gradients(given.step)
    if allocation is not None:
        tokens = seen[1].clone()  # of the batch, by which the sums that gradients are will be divided
        dist.all_reduce(tokens)
        allocation.add_penalty_(tokens.clamp_min(1) * (given.loss_scale / given.positions))
    totals[2] = mesh.share(gradient_squares(engine.model))
    given.status.put(totals[3:8])
    return totals


def read_totals(totals: Tensor, given: StepInput) -> StepReport:
    """Reads the report in what `local_totals` gave, summed over all ranks."""
    loss_sum, tokens, norm_squared, *others = totals.tolist()
    told, sums = others[:5], others[5:]
    finite = math.isfinite(norm_squared)
    norm = math.sqrt(norm_squared) * mean_factor(int(tokens), given) if finite else math.inf
    by_source = means_by_source(sums)
    return StepReport(mean_loss(loss_sum, tokens), norm, int(tokens), **told_by_all(*told), by_source=by_source)


def told_by_all(asked: float, damaged: float, digests: float, squares: float, pairs: float) -> dict[str, Any]:
    """Returns what a `StepReport` says of the sums of what `RankStatus` puts: whether some rank is asked to stop, whether all read
    the same and nothing damaged, what rank 0's clock asks for, and the pairs. Numbers are equal where the mean of their squares is
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


def valid_tokens(batches: list[MicroBatch], device: torch.device) -> Tensor:
    """Counts the tokens of these micro-batches that have a label, a float64 scalar on the device."""
    counts = [(batch.labels.to(device, non_blocking=True) != IGNORE).sum() for batch in batches]
    return torch.stack(counts).sum().double()


def mean_factor(tokens: int, given: StepInput) -> float:
    """Returns what makes of the sum of scaled losses divided by positions, M, the mean over valid tokens, N: M / N / scale."""
    return given.positions / max(1, tokens) / given.loss_scale
