"""What makes a step of a run, as configured: the forward and backward of its micro-batches, and the optimizer's update.

A step has one of four forms, which take and give the same: in order; at once, where ranks of a pipeline do not wait for the
norm of all gradients; in the backward; and DeepSpeed's own.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from rowwise.optim.average import Average
from rowwise.optim.build import follow_schedule
from rowwise.optim.flat import FlatOptimizer
from rowwise.optim.in_backward import InBackward
from rowwise.optim.optimizer import Optimizer, update_count
from rowwise.optim.sparse.build import Sparsity
from rowwise.parallel.device import device_of
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.row_file import RowFile
from rowwise.parallel.shard import clip_factor, gradient_file, gradients, scale_
from rowwise.trainer.accelerate.engine import DeepSpeedEngine, step_by_deepspeed
from rowwise.trainer.activations import ranges_of
from rowwise.trainer.adapters.allocate import Allocation
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.engine import Engine
from rowwise.trainer.loss import mean_loss, means_by_source
from rowwise.trainer.step import (
    StepInput,
    StepReport,
    compute_gradients,
    local_totals,
    mean_factor,
    read_totals,
    told_by_all,
    valid_tokens,
)

Update = Callable[[StepInput], StepReport]
# Says of a step, by its numbers, which all ranks have, whether it is a spike, and whether its update is held for that.
Judge = Callable[[StepReport], StepReport]


def accept(report: StepReport) -> StepReport:
    """Judges every update to be good, and holds nothing."""
    return report


def make_update(
    config: TrainConfig,
    mesh: Mesh,
    engine: Engine,
    optimizer: Optimizer | FlatOptimizer,
    sparsity: Sparsity | None,
    judge: Judge = accept,
    average: Average | None = None,
    allocation: Allocation | None = None,
) -> Update:
    """Makes the function that makes a step of the run: its learning rate, its gradients, and its update, in the form that the
    configuration asks for. The gradients it used stay until they are let go. What is not for `judge` to hold is the update in
    the backward, which is made before its numbers are known. `average` takes in the weights of every update;
    `allocation` chooses triplets after it."""
    if isinstance(engine, DeepSpeedEngine):
        form = functools.partial(step_by_deepspeed, engine, mesh, judge)
    elif isinstance(optimizer, FlatOptimizer):
        raise TypeError("flat pieces are DeepSpeed's: no other engine has them")
    elif config.optim.in_backward:
        assert engine.complete is not None
        in_backward = InBackward(optimizer, engine.complete, device_of(mesh.device).own_stream)
        form = functools.partial(step_in_backward, engine, in_backward, mesh, judge)
    elif config.parallel.post_validation:
        form = functools.partial(step_at_once, engine, optimizer, mesh, judge)
    else:
        form = functools.partial(step_in_order, engine, optimizer, sparsity, mesh, judge, allocation)

    ranges = ranges_of(engine.model)

    def update(given: StepInput) -> StepReport:
        lr = follow_schedule(optimizer, config.optim, config.schedule, given.step - 1, config.steps)
        report = replace(form(given), lr=lr)
        if ranges is not None:
            ranges.move()
        if average is not None and report.applied:
            average.move(update_count(optimizer))
        return report

    return update


def step_in_order(
    engine: Engine,
    optimizer: Optimizer,
    sparsity: Sparsity | None,
    mesh: Mesh,
    judge: Judge,
    allocation: Allocation | None,
    given: StepInput,
) -> StepReport:
    """Makes the ordinary step: gradients, their norm, and the update, with what follows for masks and triplets."""
    report = judge(compute_gradients(engine, mesh, given, sparsity, allocation))
    if sparsity is not None:
        sparsity.step(optimizer, given.step, report.applied)
    elif report.applied:
        optimizer.step()
        if allocation is not None:
            allocation.step(given.step)
    return report


def step_at_once(engine: Engine, optimizer: Optimizer, mesh: Mesh, judge: Judge, given: StepInput) -> StepReport:
    """Makes the ordinary step without waiting between gradients and update (Qi et al., *Zero Bubble*, section 4): each rank
    steps as soon as its own gradients are there, as if none were clipped, and begins the forwards of `given.ahead` while the
    global norm is on its way; where that was wrong, those are dropped, the step is undone, and made again with clipped
    gradients or not at all. Equal to the ordinary step to the last bit.

    Beside it, one all-reduce of one float64 (the valid tokens) while the micro-batches go through; and a copy of this
    rank's rows of the parameters and their states for as long as the norm is on its way. The host waits for the device
    twice: before the optimizer's step and for the norm.
    """
    tokens = valid_tokens(given.batches, mesh.device)
    counted = dist.all_reduce(tokens, async_op=True)
    totals = local_totals(engine, mesh, given)
    own_norm = totals[2].clone()
    summed = dist.all_reduce(totals, async_op=True)
    assert counted is not None and summed is not None
    counted.wait()
    shards, file, before = gradients(engine.model), gradient_file(engine.model), None
    norm_squared, count = torch.stack((own_norm, tokens)).tolist()
    if math.isfinite(norm_squared):
        # Every stage of a replica counted the same tokens.
        scale_(shards, file, mean_factor(int(count) // mesh.stages, given))
        before = optimizer.snapshot()
        optimizer.step()
    if given.ahead is not None:
        engine.begin(given.ahead)
    summed.wait()
    report = judge(read_totals(totals, given))
    _validate(report, engine, optimizer, before, shards, file, clip_factor(report.grad_norm, given.clip_norm))
    return report


def _validate(
    report: StepReport,
    engine: Engine,
    optimizer: Optimizer,
    before: list[Tensor] | None,
    shards: list[Tensor],
    file: RowFile | None,
    factor: float,
) -> None:
    """Takes back what was wrong of a step made at once: where its gradients are clipped by `factor` or its update is not to be,
    the update, from the copies `before`; and what was begun, also where something comes between this step and the next."""
    between = report.stop or not report.sound or report.evaluate or report.save
    wrong = not report.applied or factor < 1
    if wrong or between:
        engine.abandon()
    if before is not None and wrong:
        optimizer.rollback(before)
    if report.finite and factor < 1:
        scale_(shards, file, factor)  # also where they are only looked at
        if report.applied:
            optimizer.step()


def step_in_backward(engine: Engine, optimizer: InBackward, mesh: Mesh, judge: Judge, given: StepInput) -> StepReport:
    """Makes the whole step of `optim.in_backward`: one micro-batch a rank, and every parameter changed by the end.

    Its gradients must be final as they come, so the valid tokens are counted before the forward: two all-reduces over
    all ranks, of 1 and of 7 float64.
    """
    here = [batch.to(mesh.device) for batch in given.batches]
    tokens = valid_tokens(here, mesh.device)
    dist.all_reduce(tokens)
    optimizer.begin()
    seen = engine.forward_backward(here, tokens.clamp_min(1).reciprocal())
    optimizer.end()
    totals = torch.cat((seen[:1], seen.new_zeros(6), seen[2:]))
    totals[1] = mesh.share(optimizer.squares())
    given.status.put(totals[2:7])
    dist.all_reduce(totals)
    loss_sum, norm_squared, *others, count = torch.cat((totals, tokens.view(1))).tolist()
    told, sums = others[:5], others[5:]
    norm = math.sqrt(norm_squared) if math.isfinite(norm_squared) else math.inf
    by_source = means_by_source(sums)
    report = StepReport(mean_loss(loss_sum, count), norm, int(count), **told_by_all(*told), by_source=by_source)
    return replace(judge(report), held=False)


def may_begin_next(config: TrainConfig, step: int) -> bool:
    """Says whether the step after `step` may be begun before `step` is known to be good: not where something else comes
    between them, or where it is to be traced as a whole."""
    between = config.eval.due(step, config.length) or config.checkpoint.due(step, config.length) or step == config.steps
    # A profile begins and ends between two steps, where nothing may be under way: it can end the process. On all ranks alike.
    watched = (config.log.with_norms, config.log.with_ranks)
    for one in (step, step + 1):
        between |= any(asked(one, config.length) for asked in watched) or config.profile.of(one)
        between |= one == config.profile.memory_step
    return config.parallel.post_validation and not between and step + 1 != config.parallel.pipeline_trace
