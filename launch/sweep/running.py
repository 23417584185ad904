"""A trial of a search under way: its agent, what it measures, and how it ended."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import torch
from filelock import FileLock

from rowwise.launch.compose import compose_tree
from rowwise.launch.outcome import Outcome, clear_outcome, read_outcome
from rowwise.launch.sweep.config import SweepConfig
from rowwise.launch.sweep.space import Space, overrides_of
from rowwise.launch.sweep.trials import trial_words
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.metrics import MetricsTail


@dataclass
class Running:
    """`lock` tells this machine's other processes that the trial is watched; `told`: the steps the pruner knows."""

    trial: optuna.Trial
    folder: Path
    slot: int
    process: subprocess.Popen
    lock: FileLock
    tail: MetricsTail
    alive_at: float
    told: set[int] = field(default_factory=set)


def slot_environment(slot: int, parallel: int, nproc: int) -> dict[str, str]:
    """GPUs of its own for each of the trials that run at the same time; on the CPU a share of the cores."""
    environment = dict(os.environ)
    if gpus := torch.cuda.device_count():
        named = environment.get("CUDA_VISIBLE_DEVICES", "")
        names = named.split(",") if named else [str(i) for i in range(gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * nproc : (slot + 1) * nproc])
    share = len(os.sched_getaffinity(0)) // (parallel * nproc)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    return environment


def start_trial(
    config: SweepConfig,
    space: Space,
    settings: dict[str, str],
    number: int,
    folder: Path,
    environment: dict[str, str],
) -> subprocess.Popen:
    """The agent of a trial, which ends when this process does."""
    clear_outcome(folder)
    words = overrides_of(space.fixed, settings)
    words = trial_words(words, config_from_tree(compose_tree(words)).tracker, config.name, number, folder)
    ours = [f"--parent={os.getpid()}", f"--job={config.name}-{number}", f"--max-restarts={config.max_restarts}"]
    ours.append(f"--log-dir={folder / 'logs'}")
    with (folder / "agent.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rowwise.launch.start", *ours, *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def outcome_of(running: Running) -> Outcome:
    """What the agent wrote, or, where it could not, how it ended."""
    if (outcome := read_outcome(running.folder)) is not None:
        return outcome
    lines = (running.folder / "agent.log").read_text(errors="replace").splitlines()
    if running.process.returncode == 2:
        refusals = [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
        return Outcome("refused", refusals[-1] if refusals else "see agent.log")
    return Outcome("failed", f"its agent ended with {running.process.returncode}; see agent.log")
