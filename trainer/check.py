"""What is refused before a run starts: the rules of all rooms, and what each room can tell of its own numbers, in order."""

import math
from dataclasses import replace
from typing import Any

from rowwise.conf.refusal import Refusals, refuse
from rowwise.optim.average import AVERAGES
from rowwise.optim.build import MOMENTUM_CYCLE, STEP_BACK, check_optimizer
from rowwise.optim.in_backward import IN_BACKWARD
from rowwise.optim.lr_schedules import check_schedule
from rowwise.optim.sparse.check import MASKED, check_sparsity
from rowwise.parallel.accelerate.config import ACCELERATED
from rowwise.parallel.activations.compress import COMPILED_CODES, SHARED_CODES
from rowwise.parallel.activations.config import RECOMPUTE
from rowwise.parallel.activations.ranges import RANGES_OF_CODES
from rowwise.parallel.config import TIMEOUT, resolve_degrees
from rowwise.parallel.gather import GATHERED
from rowwise.parallel.pipeline_schedule.cut import check_stages
from rowwise.parallel.precision import BF16_PARAMETERS, LOSS_SCALE
from rowwise.parallel.reduce import REDUCED
from rowwise.parallel.sequence import HEADS
from rowwise.trainer.activations import OWN_LAYERS
from rowwise.trainer.adapters.check import ADAPTED, check_adapter
from rowwise.trainer.adapters.frozen import FROZEN_DTYPE
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.config import FOLDER, LENGTH, LINES, TrainConfig, tree_of
from rowwise.trainer.data.batches import check_batch
from rowwise.trainer.data.config import Mixture
from rowwise.trainer.data.mixture import check_mixture
from rowwise.trainer.evaluate import EVALUATION
from rowwise.trainer.keys import check_folder_name
from rowwise.trainer.lr_range import RANGE_TEST
from rowwise.trainer.manifest import CHECKPOINTS
from rowwise.trainer.models.decoder import check_model, parameter_specs
from rowwise.trainer.models.form import with_length
from rowwise.trainer.models.specs import STABLE_EMBEDDING
from rowwise.trainer.own import OWN, check_linear
from rowwise.trainer.sample import SAMPLES
from rowwise.trainer.spike import SPIKES
from rowwise.trainer.stages import COMPILED_STAGES, PIPELINED, WITHOUT_PIPELINE, check_pipeline
from rowwise.trainer.tracker import check_tracker
from rowwise.trainer.watching import PROFILE

# What must hold before the mesh is known, and what only then can be asked.
NUMBERS: Refusals = (*LENGTH, *TIMEOUT, *LINES, *RECOMPUTE)
COMPOSED: Refusals = (
    *COMPILED_STAGES,
    *STEP_BACK,
    *BF16_PARAMETERS,
    *IN_BACKWARD,
    *SPIKES,
    *MASKED,
    *ADAPTED,
    *FROZEN_DTYPE,
    *OWN_LAYERS,
    *COMPILED_CODES,
    *SHARED_CODES,
    *RANGES_OF_CODES,
    *GATHERED,
    *REDUCED,
    *PROFILE,
)


def check(config: TrainConfig, world_size: int) -> TrainConfig:
    """Refuses what does not compose on `world_size` workers, and returns the configuration with the degrees of the mesh
    filled in. Needs no process group. Raises ValueError."""
    _refuse_non_numbers(tree_of(config), "")
    refuse(config, NUMBERS)
    check_folder_name("name", config.name)
    refuse(config, FOLDER)
    check_model(config.model)
    config = replace(config, model=with_length(config.model, config.batch.seq_len))
    check_adapter(config.adapter, parameter_specs(config.model))
    specs = run_specs(config)
    check_optimizer(config.optim, specs)
    refuse(config, STABLE_EMBEDDING)
    check_schedule(config.schedule, config.known_steps)
    refuse(config, (*MOMENTUM_CYCLE, *RANGE_TEST, *LOSS_SCALE))
    check_sparsity(config.sparsity, specs, config.known_steps)
    check_linear(config, specs)
    if isinstance(config.data, Mixture):
        check_mixture(config.data)
    refuse(config, (*CHECKPOINTS, *AVERAGES, *EVALUATION, *SAMPLES))
    config = check_layout(config, world_size)
    check_tracker(config.tracker)
    return config


def check_layout(config: TrainConfig, world_size: int) -> TrainConfig:
    """Refuses, of a run whose numbers are checked, what does not go together on `world_size` workers, and returns it with the degrees
    of the mesh filled in. Raises ValueError."""
    config = replace(config, parallel=resolve_degrees(config.parallel, world_size))
    refuse(config, ACCELERATED)
    check_batch(config.batch, config.parallel.data_degree)
    refuse(config, (*OWN, *HEADS, *WITHOUT_PIPELINE))
    if config.parallel.pipeline > 1:
        check_stages(config.model.layers, config.parallel.pipeline * config.parallel.virtual_stages)
        refuse(config, PIPELINED)
        check_pipeline(config.parallel, config.micro_batches)
    refuse(config, COMPOSED)
    return config


def _refuse_non_numbers(tree: dict[str, Any], path: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _refuse_non_numbers(value, f"{path}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}{key}={value}: give a finite number")
