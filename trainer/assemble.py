"""What a run consists of on this rank: what runs its model, what changes it, and what a checkpoint holds of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rowwise.optim.average import Average
from rowwise.optim.build import Assignments, assignments, build_optimizer
from rowwise.optim.flat import FlatOptimizer
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.sparse.build import Sparsity
from rowwise.parallel.accelerate.config import accelerated, by_deepspeed
from rowwise.parallel.activations.saved import Keeper
from rowwise.parallel.away import away_of
from rowwise.parallel.host_rows import HostRows
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.row_file import RowFile, row_file_of
from rowwise.trainer.accelerate.deepspeed import on_deepspeed, remove_files
from rowwise.trainer.accelerate.fsdp2 import on_fsdp2
from rowwise.trainer.activations import keeper_in
from rowwise.trainer.adapters.allocate import Allocation
from rowwise.trainer.adapters.config import AdaLora
from rowwise.trainer.adapters.specs import run_specs
from rowwise.trainer.build import build_model
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.engine import Engine
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.pipeline import StagedDecoder, of_every_stage
from rowwise.trainer.states import LiveStates, States


@dataclass(frozen=True)
class Assembled:
    """A run on this rank. `model`: the decoder, or this rank's stages of it. `assignments`: which rule the parameters of each stage
    follow. `files`: in which some of its rows lie. `average`: of the weights, where one is kept. `allocation`: of triplets, where
    these are chosen. `close`: removes what it has beside memory."""

    model: Decoder | StagedDecoder
    engine: Engine
    optimizer: Optimizer | FlatOptimizer
    sparsity: Sparsity | None
    states: States
    assignments: list[Assignments]
    files: Sequence[RowFile] = ()
    average: Average | None = None
    allocation: Allocation | None = None
    close: Callable[[], None] = lambda: None

    @property
    def keeper(self) -> Keeper | None:
        """What keeps the results of its layers for the backward; None where they are kept as they are."""
        return keeper_in(self.model)


def assemble(config: TrainConfig, mesh: Mesh) -> Assembled:
    """Builds the model of a run, puts it on the mesh, and gives it its optimizer. All ranks call it. Raises EngineUnfit, and OSError
    where a folder that rows wait in has no room for them."""
    model = build_model(config, mesh)
    engine: Engine
    if by_deepspeed(config):
        assert isinstance(model, Decoder)
        engine, flat, kept, told = on_deepspeed(model, config, mesh)
        return Assembled(model, engine, flat, None, kept, [told], close=lambda: remove_files(config, mesh.rank))
    if accelerated(config):
        assert isinstance(model, Decoder)
        engine, sparsity = on_fsdp2(model, config, mesh), None
    else:
        engine, sparsity = parallelize(model, config, mesh)
    home = home_of(config, model, mesh.device)
    optimizer = build_optimizer(model, config.optim, config.seed, home)
    average = None if config.average.ema is None else Average(model, config.average, config.seed)
    allocation = allocation_of(config, model, mesh)
    states = LiveStates(model, optimizer, sparsity, average, allocation)
    rules = of_every_stage(assignments(model, optimizer), mesh)
    files, close = ((), lambda: None) if home is None else (home.files, home.close)
    return Assembled(model, engine, optimizer, sparsity, states, rules, files, average, allocation, close)


def allocation_of(config: TrainConfig, model: Decoder | StagedDecoder, mesh: Mesh) -> Allocation | None:
    """Returns what chooses the triplets of the run's adapter; None where it has none."""
    if not isinstance(config.adapter, AdaLora):
        return None
    stages = None if mesh.pipeline is None else mesh.pipeline.group
    return Allocation(model, config.adapter, run_specs(config), config.steps, stages)


def home_of(config: TrainConfig, model: Decoder | StagedDecoder, device: torch.device) -> HostRows | None:
    """Says where the optimizer's states wait, and what brings all that it steps on to the host; None: they are where the parameters
    are. Of the files that rows lie in each option has its own: what is wrong with one names its option."""
    where, away = config.memory.offload_states, away_of(model)
    if where == "none":
        return None
    states = row_file_of("memory.offload_states", where)
    files = (states,) if away is None else (states, away.files.params, away.files.gradients)
    return HostRows(device, [file for file in files if file is not None], states)
