"""What a sweep is: its keys, what is refused before its first trial, and the plan kept in its folder."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from rowwise.launch.agent import default_nproc, require_ranks
from rowwise.launch.compose import compose_part, compose_tree, key_of
from rowwise.launch.sweep.space import Space, overrides_of, parse_space
from rowwise.trainer.config import TrainConfig, check, check_folder_name, config_from_tree
from rowwise.trainer.files import write_whole
from rowwise.trainer.prepare import examine

OWN = ("run_dir", "name")
HYDRAS = ("hydra/launcher", "hydra.launcher", "hydra.verbose", "hydra/hydra_logging", "hydra/job_logging")
OF_A_SEARCH = {"trials", "parallel", "seed", "pruner", "factor", "storage"}


@dataclass(frozen=True)
class SweepConfig:
    """The sweep itself; conf/sweep.yaml says what each key is."""

    name: str
    folder: str
    search: Literal["none", "grid", "random", "tpe", "gp"]
    trials: int
    parallel: int
    seed: int
    goal: Literal["eval_loss", "loss"]
    pruner: Literal["none", "halving"]
    factor: int
    storage: str | None
    max_restarts: int


def resolve(words: list[str], here: bool = True) -> tuple[SweepConfig, Space]:
    """The sweep, and what is varied: all checked, also against this machine where trials run `here`. Raises ValueError."""
    keys = {word: key_of(word) for word in words}
    own = [word for word, key in keys.items() if key.startswith(("sweep.", "hydra.", "hydra/"))]
    for word, key in keys.items():
        if key in OWN:
            raise ValueError(f"{word}: a sweep gives every trial its own; give sweep.name, or sweep.folder")
        if word == "resume=never":
            raise ValueError("resume=never: a sweep goes on with trials that were cut off; leave it out")
        if word in own and not key.startswith(("sweep.", *HYDRAS)):
            raise ValueError(f"{word}: a sweep sets this itself; of Hydra's own, {', '.join(HYDRAS)} are possible")
    config, settings = compose_part("sweep", SweepConfig, own)
    check_sweep(config, own)
    space = parse_space([word for word in words if word not in own])
    check_trials(config, settings.launcher, space, here)
    return config, space


def check_sweep(config: SweepConfig, own: list[str]) -> None:
    """Raises ValueError."""
    check_folder_name("sweep.name", config.name)
    for key, least in (("trials", 1), ("parallel", 1), ("factor", 2), ("max_restarts", 0)):
        if getattr(config, key) < least:
            raise ValueError(f"sweep.{key}={getattr(config, key)}: give at least {least}")
    given = {word.partition("=")[0].removeprefix("sweep.") for word in own}
    if config.search == "none" and (idle := sorted(given & OF_A_SEARCH)):
        raise ValueError(
            f"sweep.{idle[0]} is of a search; give sweep.search=grid for every combination, or random, tpe or gp"
        )
    if config.search == "grid" and given & {"trials", "seed"}:
        raise ValueError("sweep.search=grid makes every combination once; leave sweep.trials and sweep.seed out")
    if config.search != "none" and any(key.startswith("hydra") for key in given):
        raise ValueError(
            "a search starts its trials itself; leave hydra's settings out, or let several machines join it"
        )


def check_trials(config: SweepConfig, launcher: DictConfig, space: Space, here: bool) -> None:
    """Refuses before the first trial what every trial, or one of the values, would be refused for. Raises ValueError."""
    if not space.varied:
        raise ValueError("nothing is varied; give a key several values, such as optim.lr=1e-3,3e-3")
    here = here and is_basic(launcher)
    nodes, tasks = launcher.get("nodes", 1), launcher.get("tasks_per_node", 1)
    if tasks != 1:
        raise ValueError(
            f"hydra.launcher.tasks_per_node={tasks}: a trial is one task a machine, and nproc= its workers"
        )
    samples = list(space.samples())
    for settings in space.grid() if config.search in ("none", "grid") else samples:
        try:
            run = config_from_tree(compose_tree(overrides_of(space.fixed, settings)))
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
        except ValueError as refusal:
            said = " ".join(f"{key}={value}" for key, value in settings.items())
            raise ValueError(f"the trial {said}: {refusal}") from None


def is_basic(launcher: DictConfig) -> bool:
    """Whether it makes one trial after the other in this process."""
    return str(launcher._target_).endswith("BasicLauncher")


def nproc_elsewhere(run: TrainConfig, launcher: DictConfig) -> int:
    """Raises ValueError where the GPUs of other machines would decide."""
    if run.nproc is None:
        known = launcher.get("gpus_per_node") or "8, for example"
        raise ValueError(f"this machine does not know the GPUs of others; give nproc={known}")
    return run.nproc


def require_slots(parallel: int, nproc: int) -> None:
    """Raises ValueError where trials at a time would share GPUs."""
    gpus = torch.cuda.device_count()
    if gpus and parallel * nproc > gpus:
        raise ValueError(
            f"sweep.parallel={parallel} with nproc={nproc} takes {parallel * nproc} GPUs, and there are {gpus}; give "
            f"sweep.parallel={gpus // nproc} at most"
        )


def check_goal(config: SweepConfig, run: TrainConfig) -> None:
    """Raises ValueError."""
    if config.goal == "eval_loss" and not run.eval.every:
        raise ValueError(
            "sweep.goal=eval_loss with eval.every=0: nothing is evaluated; give eval.every, or sweep.goal=loss"
        )


def first_rung(config: SweepConfig, space: Space) -> int:
    """The step at which halving first ends trials: of the first evaluation, or, by the loss of steps, so early that
    three more rungs follow."""
    run = config_from_tree(compose_tree(overrides_of(space.fixed, next(space.samples()))))
    return run.eval.every if config.goal == "eval_loss" else max(1, run.steps // config.factor**3)


def largest_nproc(space: Space) -> int:
    """Workers of the trial that has most."""
    every = (config_from_tree(compose_tree(overrides_of(space.fixed, settings))) for settings in space.samples())
    return max(run.nproc or default_nproc() for run in every)


def keep_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Writes what the sweep is to sweep.json. Raises ValueError where another stands there: its trials would be mixed up."""
    path = folder / "sweep.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before != plan:
            changed = ", ".join(key for key in plan if before.get(key) != plan[key])
            raise ValueError(f"{folder} holds another sweep ({changed} differ); give the same, or another sweep.name")
    else:
        write_whole(path, json.dumps(plan, indent=1) + "\n")
