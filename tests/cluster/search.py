"""A search of twenty real trials, killed and continued: `make test-slurm`. Pytest finds this file only where it is named."""

import csv
import random
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil

from commands import overrides_of, start
from rowwise.trainer.metrics import read_metrics

TRIALS = 20


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


def test_a_search_that_is_killed_ends_like_one_never_killed(tmp_path):
    """SIGKILL at random instants, to the search alone: its agents see it gone, and their workers save and leave."""
    instants = random.Random(11)
    kills = 0
    while True:
        sweep = begin(tmp_path / "killed")
        try:
            sweep.wait(instants.uniform(8, 35) if kills < 3 else 400)
            break
        except subprocess.TimeoutExpired:
            assert kills < 3, "the search hangs"
            sweep.kill()
            sweep.wait()
            kills += 1
    whole = begin(tmp_path / "whole")
    for folder, process in ((tmp_path / "killed", sweep), (tmp_path / "whole", whole)):
        assert process.wait(400) == 0, (folder / "log").read_text()[-3000:]
        trials = finished(folder / "sweeps/default")
        assert len(trials) == TRIALS
        states = [trial.state.name for trial in trials]
        assert set(states) == {"COMPLETE", "PRUNED"}, states
        for trial in trials:
            steps = [record["step"] for record in read_metrics(folder / f"sweeps/default/trial-{trial.number}")]
            assert steps == list(range(1, len(steps) + 1))
            assert (trial.state.name == "COMPLETE") == (len(steps) == 27) or trial.state.name == "PRUNED"
    assert kills == 3
    time.sleep(2)
    ours = [
        p for p in psutil.process_iter() if str(tmp_path) in " ".join(p.cmdline()) and p.pid != psutil.Process().pid
    ]
    assert not ours, "a trial was left running"


def test_a_grid_that_is_asked_to_stop_tells_what_there_is_and_goes_on(tmp_path):
    words = [word for word in overrides_of(tmp_path, "steps=300", "nproc=1") if not word.startswith("run_dir=")]
    command = [sys.executable, "-m", "rowwise.launch.sweep", "optim.lr=1e-3,3e-3", "sweep.goal=loss", *words]
    folder = tmp_path / "sweeps/default"
    for asked, states in ((True, ["stopped", "not begun"]), (False, ["complete", "complete"])):
        sweep, deadline = start(tmp_path, command), time.monotonic() + 90
        while asked and len(read_metrics(folder / "trial-0")) < 10:
            assert sweep.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        if asked:
            sweep.terminate()
        assert sweep.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
        with (folder / "sweep.csv").open() as file:
            assert [row["state"] for row in csv.DictReader(file)] == states
    for trial in (folder / "trial-0", folder / "trial-1"):
        assert [record["step"] for record in read_metrics(trial)] == list(range(1, 301))
