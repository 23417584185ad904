"""Every combination of a sweep, by Hydra's multirun and any of its launchers; a task is the agent of a trial's workers."""

import contextlib
import os
import secrets
import sys
from pathlib import Path
from types import FrameType

import hydra
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rowwise.launch.agent import Job, default_nproc, require_ranks, run_workers
from rowwise.launch.compose import key_of
from rowwise.launch.meeting import TOKEN, slurm_meeting
from rowwise.launch.sweep.config import SweepConfig, is_basic, keep_plan
from rowwise.launch.sweep.space import Space
from rowwise.launch.sweep.trials import Trial, trial_words
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.stop import hearing


def multirun(config: SweepConfig, space: Space, words: list[str]) -> list[Trial]:
    """Every combination, by Hydra's launcher. Raises ValueError where the folder is of another sweep, or in use."""
    folder, grid = Path(config.folder).absolute(), list(space.grid())
    os.environ["PYTHONSAFEPATH"] = "1"  # jobs inherit it too: no module of the working directory is theirs
    os.environ.setdefault(TOKEN, secrets.token_hex(32))  # for jobs of several machines, which inherit it
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0), hearing(_leave), contextlib.suppress(KeyboardInterrupt):
            keep_plan(folder, {"fixed": space.lasting, "trials": grid})
            launch_multirun(words)
    except Timeout:
        raise ValueError(f"{folder} is in use by another sweep; wait for it, or give another sweep.name") from None
    return [Trial(number, settings, folder / f"trial-{number}") for number, settings in enumerate(grid)]


def _leave(number: int, frame: FrameType | None) -> None:
    """Between trials; during one its agent hears."""
    raise KeyboardInterrupt


def launch_multirun(words: list[str]) -> None:
    """Hydra reads its command line from sys.argv."""
    before, sys.argv = sys.argv, ["rowwise sweep", "--multirun", *words]
    try:
        hydra.main(version_base="1.3", config_path="pkg://rowwise.conf", config_name="sweep")(run_trial)()
    finally:
        sys.argv = before


def run_trial(config: DictConfig) -> str:
    """Runs the trial to its end, and returns its state. A failure is recorded, and is no error of the sweep's."""
    settings, sweep = HydraConfig.get(), config.sweep
    folder = Path(settings.runtime.output_dir)
    own = [word for word in settings.overrides.task if not key_of(word).startswith("sweep.")]
    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    run = config_from_tree({str(key): value for key, value in tree.items() if key != "sweep"})
    words = trial_words(own, run.tracker, sweep.name, settings.job.num, folder)
    nproc = run.nproc or default_nproc()
    require_ranks(nproc)
    name = f"{sweep.name}-{settings.job.num}"
    basic, patience = is_basic(settings.launcher), run.parallel.timeout_seconds
    meeting = None if basic else slurm_meeting()  # a step in which the whole sweep stands is none of the trial's
    job = Job(
        tuple(words), folder, run.known_steps, nproc, meeting, name, patience, sweep.max_restarts, folder / "logs"
    )
    # A signal that stopped the trial then does to this process what it would have done: submitit queues it again.
    outcome = run_workers(job, relay=not basic)
    if basic and outcome.state == "stopped":
        raise KeyboardInterrupt  # the other trials too
    return outcome.state
