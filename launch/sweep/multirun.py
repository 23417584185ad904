"""Every combination of a sweep, by Hydra's multirun and any of its launchers; a task is the agent of a trial's workers."""

import contextlib
import os
import secrets
import sys
from pathlib import Path
from types import FrameType

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rowwise.launch.agent import run_workers
from rowwise.launch.compose import compose_tree, key_of
from rowwise.launch.job import Job
from rowwise.launch.leaving import leave_report
from rowwise.launch.model_folder import SETTINGS
from rowwise.launch.overrides import SEARCHPATH
from rowwise.launch.ranks import default_nproc, require_ranks
from rowwise.launch.rendezvous import TOKEN, slurm_rendezvous
from rowwise.launch.sweep.config import SweepConfig, is_basic, keep_asked, keep_plan
from rowwise.launch.sweep.space import Space
from rowwise.launch.sweep.trials import LEAVES, Trial, trial_words
from rowwise.launch.warm import Warm
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.stop import hearing


def multirun(config: SweepConfig, space: Space, words: list[str], warm: Warm | None) -> list[Trial]:
    """Makes every combination, by Hydra's launcher; `warm` forks the workers of trials that are made here. Raises ValueError where
    the folder is of another sweep, or in use."""
    folder, grid = Path(config.folder).absolute(), list(space.grid())
    os.environ["PYTHONSAFEPATH"] = "1"  # jobs inherit it too: no module of the working directory is theirs
    os.environ.setdefault(TOKEN, secrets.token_hex(32))  # for jobs of several machines, which inherit it
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0), hearing(_leave), contextlib.suppress(KeyboardInterrupt):
            keep_plan(folder, {"fixed": space.lasting, "trials": grid})
            keep_asked(folder, len(grid), config.goal)
            launch_multirun(words, warm)
    except Timeout:
        raise ValueError(f"{folder} is in use by another sweep; wait for it, or give another sweep.name") from None
    return [Trial(number, settings, folder / f"trial-{number}") for number, settings in enumerate(grid)]


def _leave(number: int, frame: FrameType | None) -> None:
    """Between trials; during one its agent hears."""
    raise KeyboardInterrupt


def launch_multirun(words: list[str], warm: Warm | None = None) -> None:
    """Launches Hydra, which reads its command line from sys.argv."""

    def run_forked(config: DictConfig) -> str:
        return run_trial(config, warm)

    task = run_trial if warm is None else run_forked  # which cannot be sent elsewhere
    before, sys.argv = sys.argv, ["rowwise sweep", "--multirun", *as_hydra_takes(words)]
    try:
        hydra.main(version_base="1.3", config_path="pkg://rowwise.conf", config_name="sweep")(task)()
    finally:
        sys.argv = before


def as_hydra_takes(words: list[str]) -> list[str]:
    """Returns overrides as Hydra takes them: with ++ where the key is that of code of one's own, which no file of conf/ has."""
    return [f"++{word.lstrip('+')}" if key_of(word).startswith(SETTINGS) else word for word in words]


def run_trial(config: DictConfig, warm: Warm | None = None) -> str:
    """Runs the trial to its end, and returns its state. A failure is recorded, and is no error of the sweep's."""
    settings, sweep = HydraConfig.get(), config.sweep
    folder = Path(settings.runtime.output_dir)
    own = [word for word in settings.overrides.task if not key_of(word).startswith("sweep.")]
    own += [word for word in settings.overrides.hydra if key_of(word) == SEARCHPATH]
    # Not what Hydra has composed for its launcher: a value is read here as everywhere.
    run = config_from_tree(compose_tree(own))
    words = trial_words(own, run.tracker, sweep.name, settings.job.num, folder)
    nproc = run.nproc or default_nproc()
    require_ranks(nproc)
    name = f"{sweep.name}-{settings.job.num}"
    basic, patience = is_basic(settings.launcher), run.parallel.timeout_seconds
    rendezvous = None if basic else slurm_rendezvous()  # a step in which the whole sweep stands is none of the trial's
    steps, restarts, gpus = run.known_steps, sweep.max_restarts, torch.cuda.device_count()
    job = Job(tuple(words), folder, steps, nproc, rendezvous, name, patience, restarts, folder / "logs", gpus)
    # A signal that stopped the trial then does to this process what it would have done: submitit queues it again.
    outcome = run_workers(job, warm, relay=not basic)
    leave_report(folder, "failed" if LEAVES in words else run.report, outcome.state)
    if basic and outcome.state == "stopped":
        raise KeyboardInterrupt  # the other trials too
    return outcome.state
