"""What a run does about a spike (`spike.py`): holds an update back, and goes back to a checkpoint."""

import functools
import math
from dataclasses import replace
from pathlib import Path

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_rank_0
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.manifest import set_aside
from rowwise.trainer.spike import Rollback, newest_anchor, require_few, spike_of
from rowwise.trainer.state import TrainState
from rowwise.trainer.step import StepReport


def spike_at(config: TrainConfig, state: TrainState, report: StepReport) -> float | None:
    """Returns the score of the step after `state` where it is a spike. An overflow that a smaller loss scale may help is none."""
    if not report.finite and config.precision.name == "fp16" and state.loss_scale.scale > 1:
        return None
    return spike_of(state.spikes, report.loss, report.grad_norm, config.spike)


def judge(config: TrainConfig, state: TrainState, report: StepReport) -> StepReport:
    """Says of the step after `state` whether it is a spike, and whether its update is held: also where the run may go back,
    since it may have nowhere to."""
    spike = spike_at(config, state, report)
    return replace(report, spike=spike, held=config.on_spike != "record" and spike is not None)


Rollbacks = list[Rollback]


def is_anchor(config: TrainConfig, step: int) -> bool:
    """Says whether a run may go back to the checkpoint of this step, which is to stay until there is a newer one."""
    return config.on_spike == "rollback" and config.length.due(config.checkpoint.every, step)


def go_back(config: TrainConfig, mesh: Mesh, state: TrainState, score: float) -> Rollbacks:
    """Returns what a run whose step after `state` is a spike goes back by, behind all that it went back by before; the checkpoints
    beyond are put aside, so that it resumes there. Empty where there is no checkpoint to go back to yet. Raises
    TooManySpikes. One pickle over `mesh.save_group`, where no save may be under way."""
    checkpoints = Path(config.run_dir) / "checkpoints"
    found = newest_anchor(checkpoints, functools.partial(is_anchor, config)) if mesh.rank == 0 else None
    to = from_rank_0(found, mesh.save_group)
    if to is None:
        return []
    require_few(state.spikes, state.step + 1, config.spike)
    if mesh.rank == 0:
        set_aside(checkpoints, beyond=to, why="rolled-back")
    after = state.position + config.batch.global_size
    last = Rollback(state.step + 1, to, state.position, after, score if math.isfinite(score) else None)
    return [*state.spikes.rollbacks, last]


def pass_over(state: TrainState, rollbacks: Rollbacks) -> Rollback:
    """Takes `state`, of the checkpoint that a run went back to, past the data of what was rolled back. Returns the last of
    `rollbacks` as it was: that checkpoint is an earlier one where some were damaged."""
    *before, last = rollbacks
    last = replace(last, to=state.step, first=state.position)
    state.spikes = replace(state.spikes, rollbacks=[*before, last])
    state.position = last.after
    return last
