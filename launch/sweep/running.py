"""A trial of a search under way: its agent, what it measures, and how it ended."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from filelock import FileLock

from rowwise.launch.compose import compose_tree
from rowwise.launch.outcome import Outcome, clear_outcome, last_refusal, read_outcome
from rowwise.launch.sweep.config import SweepConfig
from rowwise.launch.sweep.space import Space, overrides_of
from rowwise.launch.sweep.trials import trial_words
from rowwise.launch.warm import Warm
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.lock import is_held
from rowwise.trainer.metrics import MetricsTail
from rowwise.trainer.stop import SIGNALS


@dataclass
class Running:
    """A trial under way. `lock` tells this machine's other processes that the trial is watched; `told`: the steps the pruner
    knows; `asked`: whether the agent was asked to stop; `pruned`: what the storage has of it too, which is slow to ask."""

    trial: optuna.Trial
    folder: Path
    slot: int
    process: subprocess.Popen
    steps: int
    lock: FileLock
    tail: MetricsTail
    alive_at: float
    told: set[int]
    asked: bool = False
    pruned: bool = False

    def ask_to_stop(self) -> None:
        if not self.asked:
            self.process.terminate()
        self.asked = True

    def has_ended(self) -> bool:
        """Says whether the trial has ended, and its workers too: where the agent was killed, they save before they leave."""
        code = self.process.poll()
        return code is not None and not (code < 0 and is_held(self.folder))


def slot_environment(slot: int, parallel: int, nproc: int) -> dict[str, str]:
    """Gives GPUs of its own to each of the trials that run at the same time; on the CPU a share of the cores."""
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
    warm: Warm | None = None,
) -> tuple[subprocess.Popen, int]:
    """Starts the agent of a trial, which ends when this process does, with workers that `warm` forks; and the trial's last step."""
    clear_outcome(folder)
    words = overrides_of(space.fixed, settings)
    run = config_from_tree(compose_tree(words))
    words = trial_words(words, run.tracker, config.name, number, folder)
    # A step of Slurm on several machines is the search's: each trial has one.
    ours = ["--nodes=1", f"--job={config.name}-{number}", f"--max-restarts={config.max_restarts}"]
    ours += [f"--log-dir={folder / 'logs'}", f"--parent={os.getpid()}"]
    with (folder / "agent.log").open("ab") as log, contextlib.ExitStack() as stack:
        lent = [] if warm is None else [stack.enter_context(warm.lend()).fileno()]
        ours += [f"--warm={number}" for number in lent]
        agent = subprocess.Popen(
            [sys.executable, "-P", "-m", "rowwise.launch.start", *ours, *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            pass_fds=lent,
        )  # fmt: skip
    return agent, run.steps


def outcome_of(running: Running) -> Outcome:
    """Returns what the agent wrote, or, where it could not, how it ended."""
    if (outcome := read_outcome(running.folder)) is not None:
        return outcome
    code = running.process.returncode
    if code == 2:
        return Outcome("refused", last_refusal(running.folder / "agent.log"))
    if -code in SIGNALS:  # before it heard
        return Outcome("stopped", "asked to stop")
    return Outcome("failed", f"its agent ended with {code}; see agent.log")
