"""The runs that a sweep's trials would be: what each would be refused for, and what a search needs to know of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from rowwise.launch.compose import compose_tree
from rowwise.launch.ranks import default_nproc, require_ranks
from rowwise.launch.sweep.config import Composed, SweepConfig, is_basic, naming
from rowwise.launch.sweep.space import Space, overrides_of
from rowwise.optim.lengths import read_length
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.prepare import examine


def check_trials(
    config: SweepConfig, launcher: DictConfig, trials: Sequence[Composed], space: Space, here: bool
) -> None:
    """Refuses before the first trial what any of them would be refused for. Raises ValueError.

    Also what this machine would refuse, where trials run `here`.
    """
    here = here and is_basic(launcher)
    nodes, tasks = launcher.get("nodes", 1), launcher.get("tasks_per_node", 1)
    if tasks != 1:
        raise ValueError(
            f"hydra.launcher.tasks_per_node={tasks}: a trial is one task a machine, and nproc= its workers"
        )
    samples = list(space.samples())
    for settings, tree in trials:
        with naming(settings):
            run = config_from_tree(tree)
            check_goal(config, run)
            if not here:
                check(run, nodes * nproc_elsewhere(run, launcher))
                continue
            nproc = run.nproc or default_nproc()
            require_ranks(nproc)
            if config.search != "none":
                require_slots(config.parallel, nproc)
            if settings in samples:  # few, since this opens the data
                examine(replace(run, run_dir=str(Path(config.folder) / "trial")), nproc)
            else:
                check(run, nproc)


def nproc_elsewhere(run: TrainConfig, launcher: DictConfig) -> int:
    """Returns the workers of a trial on another machine. Raises ValueError where the GPUs of other machines would decide."""
    if run.nproc is None:
        known = launcher.get("gpus_per_node") or "8, for example"
        raise ValueError(f"this machine does not know the GPUs of others; give nproc={known}")
    return run.nproc


def require_slots(parallel: int, nproc: int) -> None:
    """Refuses trials at a time that would share GPUs. Raises ValueError."""
    gpus = torch.cuda.device_count()
    if gpus and parallel * nproc > gpus:
        raise ValueError(
            f"sweep.parallel={parallel} with nproc={nproc} takes {parallel * nproc} GPUs, and there are {gpus}; give "
            f"sweep.parallel={gpus // nproc} at most"
        )


def check_goal(config: SweepConfig, run: TrainConfig) -> None:
    """Refuses a goal that no trial would measure. Raises ValueError."""
    if config.goal == "eval_loss" and not run.eval.every:
        raise ValueError(
            "sweep.goal=eval_loss with eval.every=0: nothing is evaluated; give eval.every, or sweep.goal=loss"
        )
    if config.search == "none" or config.pruner == "none":
        return
    if config.goal == "eval_loss" and read_length("eval.every", run.eval.every).unit == "time":
        raise ValueError(
            f"sweep.goal=eval_loss with eval.every={run.eval.every}: trials are compared at the same steps; give eval.every in "
            "steps or as a share of the run, or sweep.pruner=none"
        )
    if run.epochs is not None:
        raise ValueError(
            f"epochs={run.epochs:g} with sweep.pruner={config.pruner}: trials are compared at steps, and these are known once "
            "the data is opened; give steps or tokens, or sweep.pruner=none"
        )


def first_rung(config: SweepConfig, space: Space) -> int:
    """Returns the step at which halving first ends trials: of the first evaluation, or, by the loss of steps, so early that
    three more rungs follow."""
    run = config_from_tree(compose_tree(overrides_of(space.fixed, next(space.samples()))))
    if config.goal == "eval_loss":
        return run.length.in_steps(read_length("eval.every", run.eval.every))
    return max(1, run.steps // config.factor**3)


def largest_nproc(space: Space) -> int:
    """Counts the workers of the trial that has most."""
    every = (config_from_tree(compose_tree(overrides_of(space.fixed, settings))) for settings in space.samples())
    return max(run.nproc or default_nproc() for run in every)
