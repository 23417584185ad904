"""Sweeps on a real Slurm: `make test-slurm`. Pytest finds this file only where it is named."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from commands import PATIENCE, overrides_of, run_in_pool
from rowwise.launch.slurm import hand_out
from rowwise.trainer.metrics import read_metrics
from runs import records
from slurm_cluster import slurm_cluster

pytestmark = pytest.mark.slow

SWEEP = [sys.executable, "-m", "rowwise.launch.sweep"]


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster() as cluster:
        yield cluster


def trial_overrides(folder: Path, *more: str) -> list[str]:
    return [word for word in overrides_of(folder, *more) if not word.startswith("run_dir=")]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_grid_whose_trials_are_jobs(cluster, ranks, tmp_path, nodes):
    """Two workers each: 2 x 2 settings on one node, and two on a worker of each of two nodes, whose agents meet."""
    words = trial_overrides(tmp_path, "steps=4", "eval.every=2", f"nproc={2 // nodes}", "data.holdout=0.1")
    launcher = ["hydra/launcher=slurm", f"hydra.launcher.nodes={nodes}", f"hydra.launcher.cpus_per_task={2 // nodes}"]
    rates = ["0.001", "0.003"][: 3 - nodes]
    varied = ["optim=adamw,lion", f"optim.lr={','.join(rates)}"]
    done = subprocess.run(
        [*SWEEP, "-m", *launcher, "hydra.launcher.array_parallelism=2", *varied, *words],
        cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr + "".join(p.read_text() for p in tmp_path.rglob("*_log.*"))
    assert done.returncode == 0, said
    folder = tmp_path / "sweeps/default"
    rows = rows_of(folder)
    made = [(row["optim"], row.get("optim.lr", "0.001")) for row in rows]
    assert made == [(rule, rate) for rule in ("adamw", "lion") for rate in rates]
    for number, row in enumerate(rows):
        assert row["state"] == "complete", said
        alone = [*overrides_of(tmp_path), *words, "nproc=null", f"run_dir={tmp_path}/alone-{number}"]
        run_in_pool(ranks, [*alone, f"optim={made[number][0]}", f"optim.lr={made[number][1]}"])
        assert records(folder / f"trial-{number}") == records(tmp_path / f"alone-{number}")
        assert float(row["eval_loss"]) == read_metrics(folder / f"trial-{number}")[-1]["eval_loss"]


def test_jobs_of_an_array_join_one_search(cluster, tmp_path):
    """Every trial is made once, in a folder of its own, and the table has them all."""
    words = trial_overrides(tmp_path, "steps=6", "eval.every=2", "nproc=1", "data.holdout=0.1", "checkpoint.every=0")
    search = ["sweep.search=random", "sweep.trials=4", "optim.lr=tag(log,interval(1e-4,1e-1))"]
    slurm = ["slurm.workers=2", "slurm.cpus_per_task=1", f"slurm.log={tmp_path}/log-%A_%a", f"to={tmp_path}/job.sh"]
    hand_out("sweep", [*search, *words, *slurm])
    array = cluster.submit(tmp_path / "job.sh")
    for job in (f"{array}_1", f"{array}_2"):
        shown = cluster.await_state(job, "COMPLETED", "FAILED")
        assert shown["JobState"] == "COMPLETED", Path(shown["StdOut"]).read_text()
    folder = tmp_path / "sweeps/default"
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    trials = optuna.load_study(study_name="default", storage=optuna.storages.JournalStorage(backend)).get_trials()
    assert [trial.state.is_finished() for trial in trials] == [True] * 4
    rows = rows_of(folder)
    assert [row["trial"] for row in rows] == list("0123")
    assert {row["state"] for row in rows} <= {"complete", "pruned"}
    assert len({row["optim.lr"] for row in rows}) == 4
    both = [(tmp_path / f"log-{array}_{task}").read_text() for task in (1, 2)]
    assert all("trial-3" in said for said in both), "each tells of all"


def test_a_trial_that_is_signalled_before_its_limit_is_queued_again(cluster, ranks, tmp_path):
    """By submitit, once its workers have saved; nothing is lost or done twice."""
    words = trial_overrides(tmp_path, "steps=300", "nproc=2", "checkpoint.every=0", "eval.every=0", "sweep.goal=loss")
    sweep = subprocess.Popen(
        [*SWEEP, "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2", "optim.lr=1e-3,3e-3", *words],
        cwd=tmp_path, env=cluster.environment, stdout=(tmp_path / "said").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    trial, deadline = tmp_path / "sweeps/default/trial-0", time.monotonic() + PATIENCE
    while len(read_metrics(trial)) < 10:
        assert sweep.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.1)
    array = cluster.run("squeue", "-h", "-t", "R", "-o", "%A").split()[0]
    cluster.run("scancel", "--signal=USR2", array)
    assert sweep.wait(PATIENCE) == 0, (tmp_path / "said").read_text()
    assert [row["state"] for row in rows_of(trial.parent)] == ["complete", "complete"]
    logs = "".join(path.read_text() for path in trial.rglob("std*.log"))
    assert logs.count("asked to stop: saved step") == 1
    assert logs.count("resumed from") == 1
    alone = [*overrides_of(tmp_path), *words[:-1], "nproc=null", f"run_dir={tmp_path}/alone", "optim.lr=1e-3"]
    run_in_pool(ranks, alone)
    assert records(trial) == records(tmp_path / "alone")
