"""A rank of a run, built as `trainer.train` builds it, whose steps a benchmark makes one by one."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from rowwise.optim.build import build_optimizer
from rowwise.optim.optimizer import Optimizer
from rowwise.parallel.mesh import Mesh, Workers, make_mesh
from rowwise.trainer.build import build_model
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.open import open_data
from rowwise.trainer.engine import Engine
from rowwise.trainer.feed import train_batches
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.step import StepInput, StepReport
from rowwise.trainer.update import make_update


@dataclass(frozen=True)
class Rank:
    """What a rank has. `step(t)` makes step t, from 1, as the loop does."""

    mesh: Mesh
    engine: Engine
    optimizer: Optimizer
    step: Callable[[int], StepReport]


@contextlib.contextmanager
def stepping(config: TrainConfig, workers: Workers) -> Iterator[Rank]:
    """Builds this rank of a checked run, and lets go of its process group at the end."""
    mesh = make_mesh(config.parallel, workers)
    try:
        data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
        engine, sparsity = parallelize(build_model(config, mesh), config, mesh)
        optimizer = build_optimizer(engine.model, config.optim, config.seed)
        update = make_update(config, mesh, engine, optimizer, sparsity)
        batches = train_batches(config, mesh, data, position=0)

        def step(number: int) -> StepReport:
            report = update(StepInput(number, next(batches), config.batch.positions, config.clip_norm))
            optimizer.zero_grad()
            return report

        yield Rank(mesh, engine, optimizer, step)
    finally:
        dist.destroy_process_group()
