"""What makes a step of a run: the forward and backward of its micro-batches, and the optimizer's update, as configured."""

import functools
from dataclasses import replace
from typing import Protocol

from rowwise.optim.in_backward import InBackward
from rowwise.optim.shell import Optimizer
from rowwise.optim.sparse.build import Sparsity
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.pipeline import Trace
from rowwise.parallel.replicate import gradient_sum
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.pipeline import StagedDecoder
from rowwise.trainer.step import (
    Hold,
    RankStatus,
    StepReport,
    compute_gradients,
    hold_none,
    step_at_once,
    step_in_backward,
)


class Update(Protocol):
    """Makes step t (counted from 1): from its micro-batches, the loss scale, what this rank tells all, where the timeline of a
    pipeline goes, and the micro-batches of the next step where it may be begun."""

    def __call__(
        self,
        step: int,
        batches: list[MicroBatch],
        loss_scale: float,
        status: RankStatus,
        trace: Trace | None = None,
        ahead: list[MicroBatch] | None = None,
    ) -> StepReport: ...


def make_update(
    config: TrainConfig,
    mesh: Mesh,
    model: Decoder | StagedDecoder,
    optimizer: Optimizer,
    sparsity: Sparsity | None,
    hold: Hold = hold_none,
) -> Update:
    """The function that makes one step, as the configuration asks. The gradients it used stay until they are let go. What is
    not for `hold` to take is the update in the backward, which is made before its numbers are known."""
    zero, places = config.parallel.zero, config.batch.global_size * config.batch.seq_len
    if config.optim.in_backward:
        in_backward = InBackward(optimizer, gradient_sum(model, mesh))
        return lambda step, batches, loss_scale, status, trace=None, ahead=None: step_in_backward(
            model, batches[0], mesh, zero, in_backward, status
        )

    def update(
        step: int,
        batches: list[MicroBatch],
        loss_scale: float,
        status: RankStatus,
        trace: Trace | None = None,
        ahead: list[MicroBatch] | None = None,
    ) -> StepReport:
        asked = (mesh, zero, places, config.clip_norm, loss_scale)
        if config.parallel.post_validation:
            assert isinstance(model, StagedDecoder)
            report = step_at_once(model, batches, *asked, optimizer, status, trace, ahead, hold)
        else:
            filter_ = None if sparsity is None else functools.partial(sparsity.filter_gradients, step)
            report = compute_gradients(model, batches, *asked, status, trace, filter_)
            report = replace(report, held=hold(report))
            if sparsity is not None:
                sparsity.step(optimizer, step, report.applied)
            elif report.applied:
                optimizer.step()
        return report

    return update


def may_begin_next(config: TrainConfig, step: int) -> bool:
    """Whether the step after `step` may be begun before `step` is known to be good: not where something else comes
    between them, or where it is to be traced as a whole."""
    between = config.eval.due(step, config.length) or config.checkpoint.due(step, config.length) or step == config.steps
    # A profile begins and ends between two steps, where nothing may be under way: it can end the process. On all ranks alike.
    watched = (config.log.with_norms, config.log.with_ranks)
    for one in (step, step + 1):
        between |= any(asked(one, config.length) for asked in watched) or config.profile.of(one)
    return config.parallel.post_validation and not between and step + 1 != config.parallel.pipeline_trace
