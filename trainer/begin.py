"""Where a run begins, or goes on: what it is loaded from, and what is known of it then."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rowwise.optim.lr_schedules import LrRange
from rowwise.parallel.activations.ranges import RunningRanges
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.objects import from_rank_0
from rowwise.parallel.precision import initial_loss_scale
from rowwise.trainer.adapters.begin import begin_adapter
from rowwise.trainer.assemble import Assembled
from rowwise.trainer.checkpoint import lacking_averages, load_first_sound, load_ranges
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import Data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.lr_range import RangeTest, points_of
from rowwise.trainer.manifest import set_aside
from rowwise.trainer.metrics import Recorded, read_metrics
from rowwise.trainer.resume import changes, find_resume, recorded_by, told_of
from rowwise.trainer.rollback import Rollbacks, pass_over
from rowwise.trainer.same_code import told_of_code
from rowwise.trainer.spike import told_of as told_of_rollback
from rowwise.trainer.state import TrainState


@dataclass(frozen=True)
class Begun:
    """Where a run starts: its numbers, what is known of the records before, what is to be said, and the manifest that it goes
    on from, if any."""

    state: TrainState
    recorded: Recorded
    remarks: list[str]
    manifest: Mapping[str, Any] = field(default_factory=dict)


def resume(
    config: TrainConfig,
    mesh: Mesh,
    data: Data,
    built: Assembled,
    rollbacks: Rollbacks,
    known: dict[str, Tensor],
) -> Begun:
    """Loads the newest sound checkpoint that `config.resume` allows into the states of `built` and the ranges of its keeper; of a run
    that was rolled back, its own. Where there is none it begins what hangs on whole matrices, or on what layers take (`known`:
    see `with_choices_made`). Says what was passed over as damaged, where it goes on, what changes, what it was rolled back by, and
    what there is to say of the keeper."""
    states, keeper = built.states, built.keeper
    told = [keeper.told] if keeper is not None and keeper.told is not None else []
    here = find_resume(config, data.train.fingerprint, bool(rollbacks)) if mesh.rank == 0 else []
    found = from_rank_0(here, mesh.save_group)
    if not found:
        batches = partial(train_batches, config, mesh, data, 0)
        if begin_adapter(config, mesh, built.engine, batches, known) and built.average is not None:
            built.average.begin()
        return Begun(TrainState(loss_scale=initial_loss_scale(config.precision)), Recorded(), told)
    checkpoint, manifest, complaints = load_first_sound(found, tensors := states.room(), mesh)
    states.write(tensors)
    if mesh.rank == 0:
        set_aside(Path(config.run_dir) / "checkpoints", beyond=manifest["step"])
    state = TrainState.from_tree(manifest["state"])
    if manifest["precision"] != config.precision.name:
        state.loss_scale = initial_loss_scale(config.precision)
    remarks = [f"warning: {complaint}; passed over" for complaint in complaints]
    remarks += [
        told_of(checkpoint, config),
        *changes(manifest, config),
        *told_of_code(manifest, config.model.own),
        *told,
    ]
    ranges = None if keeper is None else keeper.ranges
    if ranges is not None and not resume_ranges(config, mesh, checkpoint, manifest, ranges):
        remarks.append("memory.ranges=running begins anew: the checkpoint has no ranges of these results")
    if built.average is not None and lacking_averages(checkpoint, built.average.named_state()):
        built.average.begin()
        remarks.append("average.ema begins anew, with the weights of the checkpoint, which has no average of them")
    if rollbacks:
        remarks.append(told_of_rollback(pass_over(state, rollbacks)))
    return Begun(state, recorded_by(checkpoint, manifest, config), remarks, manifest)


def resume_ranges(
    config: TrainConfig, mesh: Mesh, checkpoint: Path, manifest: Mapping[str, Any], ranges: RunningRanges
) -> bool:
    """Loads what the checkpoint holds of the running ranges of 8-bit codes; says whether that is of the results that are kept now."""
    same = manifest["config"].get("memory", {}).get("recompute", "none") == config.memory.recompute
    return same and load_ranges(checkpoint, ranges, mesh)


def range_test(config: TrainConfig, mesh: Mesh, step: int) -> RangeTest | None:
    """Returns the learning-rate range test that a run is, with what its records up to `step` say; None where it is none. Rank 0
    reads them for all: ranks that read otherwise would end at different steps."""
    if not isinstance(config.schedule, LrRange):
        return None
    made = read_metrics(Path(config.run_dir)) if mesh.rank == 0 else []
    points = points_of([record for record in made if record["step"] <= step])
    return RangeTest(from_rank_0(points, mesh.save_group))
