"""A search of real trials, killed and continued: `make test-slurm`. Pytest finds this file only where it is named."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest

from commands import PATIENCE, overrides_of, start
from rowwise.trainer.metrics import read_metrics

pytestmark = pytest.mark.slow

TRIALS = 8


def finished(folder: Path) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    trials = optuna.load_study(study_name="default", storage=optuna.storages.JournalStorage(backend)).get_trials()
    return [trial for trial in trials if trial.state.is_finished()]


def begin(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    words = [word for word in overrides_of(folder, "steps=27", "eval.every=3") if not word.startswith("run_dir=")]
    search = ["sweep.search=tpe", f"sweep.trials={TRIALS}", "sweep.parallel=2", "data.holdout=0.1", "nproc=1"]
    space = ["optim.lr=tag(log,interval(1e-4,1e-1))", "optim=adamw,lion"]
    return start(folder, [sys.executable, "-m", "rowwise.launch.sweep", *search, *space, *words])


def await_trials(folder: Path, count: int, sweep: subprocess.Popen) -> None:
    """Until that many trials have begun."""
    while len(list(folder.glob("sweeps/default/trial-*"))) < count:
        assert sweep.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.02)


def processes_of(folder: Path) -> list[psutil.Process]:
    """What runs with that folder on its command line; a process may end while it is looked at."""
    everything = psutil.process_iter(["cmdline"])
    return [p for p in everything if str(folder) in " ".join(p.info["cmdline"] or []) and p.pid != os.getpid()]


def test_a_search_that_is_killed_ends_like_one_never_killed(tmp_path):
    """SIGKILL at a random instant, to the search alone: its agents see it gone, and their workers save and leave. Every trial
    is made, once, and is complete or pruned."""
    sweep = begin(folder := tmp_path / "killed")
    await_trials(folder, 3, sweep)  # of eight: what is left takes longer than the instant
    time.sleep(random.Random(11).uniform(0, 2))
    sweep.kill()
    assert sweep.wait() == -signal.SIGKILL, (folder / "log").read_text()[-3000:]
    sweep = begin(folder)
    assert sweep.wait(PATIENCE) == 0, (folder / "log").read_text()[-3000:]
    trials = finished(folder / "sweeps/default")
    assert len(trials) == TRIALS
    states = [trial.state.name for trial in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}, states
    for trial in trials:
        steps = [record["step"] for record in read_metrics(folder / f"sweeps/default/trial-{trial.number}")]
        assert steps == list(range(1, len(steps) + 1))
        assert (trial.state.name == "COMPLETE") == (len(steps) == 27) or trial.state.name == "PRUNED"
    deadline = time.monotonic() + 60
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, f"a trial was left running: {left}"
        time.sleep(0.2)


def test_a_grid_that_is_asked_to_stop_tells_what_there_is_and_goes_on(tmp_path):
    _, *words = overrides_of(tmp_path, "steps=120", "batch.micro_size=8", "nproc=1")  # but for run_dir
    command = [sys.executable, "-m", "rowwise.launch.sweep", "optim.lr=1e-3,3e-3", "sweep.goal=loss", *words]
    folder = tmp_path / "sweeps/default"
    for asked, states in ((True, ["stopped", "not begun"]), (False, ["complete", "complete"])):
        sweep, deadline = start(tmp_path, command), time.monotonic() + PATIENCE
        while asked and len(read_metrics(folder / "trial-0")) < 10:
            assert sweep.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        if asked:
            sweep.terminate()
        assert sweep.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
        with (folder / "sweep.csv").open() as file:
            assert [row["state"] for row in csv.DictReader(file)] == states
    for trial in (folder / "trial-0", folder / "trial-1"):
        assert [record["step"] for record in read_metrics(trial)] == list(range(1, 121))
