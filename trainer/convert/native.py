"""A checkpoint of DeepSpeed, written as one of ours: a run's folder that `rowwise train` goes on in, or from.

What the run would save says what is needed, by name, shape and dtype; each tensor is read when it is written, so that one is in
memory at a time.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from rowwise.optim.build import build_optimizer
from rowwise.parallel.mesh import Workers
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.convert.foreign import MASTER, Foreign, key_of
from rowwise.trainer.convert.names import theirs_by_ours
from rowwise.trainer.data.open import Data
from rowwise.trainer.files import write_whole
from rowwise.trainer.manifest import begin, commit
from rowwise.trainer.metrics import Recorded
from rowwise.trainer.models.decoder import Decoder, parameter_specs
from rowwise.trainer.one_by_one import Read, save_one_by_one
from rowwise.trainer.parallelize import parameter_dtype
from rowwise.trainer.state import TrainState
from rowwise.trainer.states import tensors_of
from rowwise.trainer.train import manifest_of


def write_run(foreign: Foreign, config: TrainConfig, workers: int, data: Data, folder: Path) -> str:
    """Writes `folder`, which exists and is empty, as that of a run of `config` whose newest checkpoint is `foreign`. Returns the
    checkpoint's name. Raises ValueError before anything is written."""
    if config.sparsity.name != "none":
        raise ValueError(
            f"sparsity={config.sparsity.name}: a checkpoint of DeepSpeed has no masks; give sparsity=none, and prune "
            "in a run that begins from its export"
        )
    tensors = tensors_needed(config)
    read, state = reader(foreign, config, tensors), state_of(foreign, config)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(tree_of(config))))
    partial = begin(folder / "checkpoints", state.step)
    files = save_one_by_one(partial, tensors, read)
    manifest = manifest_of(config, Workers(world_size=workers), data, state, Recorded(state.step))
    return commit(partial, {**manifest, "files": files}).name


def tensors_needed(config: TrainConfig) -> dict[str, Tensor]:
    """Returns every tensor of a run's checkpoint, on the meta device."""
    with torch.device("meta"):
        model = Decoder(config.model).to(parameter_dtype(config))
    return tensors_of(model, build_optimizer(model, config.optim, config.seed))


def state_of(foreign: Foreign, config: TrainConfig) -> TrainState:
    """Returns the numbers that the run goes on from: the data where DeepSpeed's stood, in samples."""
    counts = foreign.counts
    return TrainState(
        step=counts.steps,
        position=counts.samples,
        tokens=counts.samples * config.batch.seq_len,
        updates=counts.updates,
        loss_scale=foreign.loss_scale(config.precision),
    )


def reader(foreign: Foreign, config: TrainConfig, needed: Mapping[str, Tensor]) -> Read:
    """Returns what reads a tensor of the run's checkpoint, flat, by its name in it. Raises ValueError for names, states and sizes
    that are not what is `needed`."""
    specs = parameter_specs(config.model)
    theirs = theirs_by_ours(specs, foreign.parameters, foreign.place)
    places: dict[str, tuple[str, str]] = {}
    for ours, name in theirs.items():
        _require_shape(foreign, name, specs[ours].shape)
        mine = {key_of(ours, state): (name, state) for state in foreign.parameters[name]}
        kept = {key for key in needed if key == key_of(ours, MASTER) or key.rpartition(".")[0] == f"optim.{ours}"}
        if mine.keys() != kept or any(needed[key].shape != specs[ours].shape for key in kept):
            has, keeps = (
                ", ".join(sorted(key.rpartition(".")[2] for key in keys if key != key_of(ours, MASTER))) or "no states"
                for keys in (mine, kept)
            )
            raise ValueError(
                f"{foreign.place} has {has} of {name}, and optim={config.optim.name} keeps {keeps} of it; possible are "
                "optim=adamw for exp_avg, exp_avg_sq, and optim=lion for exp_avg"
            )
        places |= mine
    return lambda key: foreign.whole(*places[key])


def _require_shape(foreign: Foreign, name: str, shape: torch.Size) -> None:
    there = foreign.shapes.get(name, shape)
    if tuple(there) != tuple(shape):
        raise ValueError(
            f"{foreign.place}: {name} has the shape {list(there)}, and the model needs {list(shape)}; give model= and "
            "model.KEY= of the model that it is of"
        )
    for state in foreign.parameters[name]:
        if (found := foreign.numel(name, state)) != shape.numel():
            raise ValueError(
                f"{foreign.place} has {found:,} of the {shape.numel():,} numbers of {name}'s {state}: the others are elsewhere "
                "(ZeRO-Infinity keeps them beside a checkpoint), or it is damaged"
            )
