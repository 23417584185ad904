"""Jobs of a real Slurm: `make test-slurm`. Pytest finds this file only where it is named."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from commands import PATIENCE, overrides_of, run_in_pool
from rowwise.launch.slurm import compose_slurm, hand_out, script
from rowwise.trainer.metrics import read_metrics
from runs import records
from slurm_cluster import GRACE_SECONDS, slurm_cluster

pytestmark = pytest.mark.slow

STEPS = 200


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """The run of two workers that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_in_pool(ranks, overrides_of(folder, f"steps={STEPS}"))
    return records(folder / "run")


def write_script(folder: Path, *words: str) -> Path:
    """Of the small run."""
    overrides = overrides_of(folder, f"steps={STEPS}", f"slurm.log={folder}/log-%j", *words)
    hand_out("train", [*overrides, f"to={folder}/job.sh"])
    return folder / "job.sh"


def write_stand_in(folder: Path, *words: str) -> Path:
    """Of a program that leaves when asked, in place of a run."""
    (folder / "stand_in.py").write_text(STAND_IN)
    config = compose_slurm([f"slurm.log={folder}/log-%A_%a", *words])
    (folder / "job.sh").write_text(script(replace(config, name="it"), [sys.executable, f"{folder}/stand_in.py"]))
    return folder / "job.sh"


STAND_IN = """
import os, signal, sys, time
def leave(number, frame):
    print("asked by", signal.Signals(number).name, flush=True)
    sys.exit(0)
if "DEAF" not in os.environ:
    signal.signal(signal.SIGUSR1, leave)
    signal.signal(signal.SIGTERM, leave)
print("begun", flush=True)
time.sleep(4 if "SLURM_RESTART_COUNT" in os.environ else 600)
"""


def await_steps(cluster, job: str, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(folder / "run")) < steps:
        shown = cluster.shown(job)
        log = Path(shown["StdOut"])
        said = log.read_text()[-4000:] if log.is_file() else ""
        assert shown["JobState"] in ("PENDING", "RUNNING") and time.monotonic() < deadline, f"{shown}\n{said}"
        time.sleep(0.1)


def await_text(cluster, job: str, text: str) -> None:
    log, deadline = Path(cluster.shown(job)["StdOut"]), time.monotonic() + PATIENCE
    while not (log.is_file() and text in log.read_text()):
        assert time.monotonic() < deadline, f"{log} never said {text!r}\n{cluster.logs()}"
        time.sleep(0.1)


def take_nodes(cluster) -> None:
    """For a more urgent job, which has had them when this returns."""
    options = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.await_state(cluster.run("sbatch", "--parsable", *options), "COMPLETED")


def assert_went_on(cluster, job: str, folder: Path, whole: list[tuple]) -> None:
    """To its end, after one job that left early, with nothing lost or done twice."""
    shown = cluster.await_state(job, "COMPLETED", "FAILED", "TIMEOUT", restarts=1)
    said = Path(shown["StdOut"]).read_text()
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert said.count("asked to stop: saved step") == 1, said
    assert said.count("resumed from") == 1, said
    assert records(folder / "run") == whole


def test_a_run_signalled_before_its_time_is_up_goes_on_in_the_next_job(cluster, whole, tmp_path):
    """By the signal that Slurm itself sends, to the same process; `test_a_time_limit` waits for Slurm's own."""
    job = cluster.submit(write_script(tmp_path, "nproc=2", "slurm.cpus_per_task=2"))
    await_steps(cluster, job, tmp_path, 10)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert_went_on(cluster, job, tmp_path, whole)


def test_a_time_limit(cluster, tmp_path):
    """Of a minute, the smallest there is; Slurm signals up to half a minute before it should."""
    words = ["nproc=1", "steps=1000000", "schedule=constant", "slurm.time=00:01:00", "slurm.signal_seconds=5"]
    job = cluster.submit(write_script(tmp_path, *words))
    await_steps(cluster, job, tmp_path, 10)
    shown = cluster.await_state(job, "RUNNING", "TIMEOUT", "FAILED", "COMPLETED", restarts=1)
    assert shown["JobState"] == "RUNNING"
    saved = len(read_metrics(tmp_path / "run"))
    await_steps(cluster, job, tmp_path, saved + 10)
    cluster.run("scancel", job)
    cluster.await_state(job, "CANCELLED")
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_gives_its_nodes_to_a_more_urgent_job_and_goes_on_afterwards(cluster, whole, tmp_path):
    job = cluster.submit(write_script(tmp_path, "nproc=2", "slurm.cpus_per_task=2"))
    await_steps(cluster, job, tmp_path, 10)
    began = time.monotonic()
    take_nodes(cluster)
    assert time.monotonic() - began < GRACE_SECONDS  # the run left when asked, and was not killed
    assert_went_on(cluster, job, tmp_path, whole)


def test_a_run_on_two_nodes_is_the_run_on_one(cluster, whole, tmp_path):
    """And goes on there, too: the signal reaches both."""
    job = cluster.submit(write_script(tmp_path, "nproc=1", "slurm.nodes=2"))
    await_steps(cluster, job, tmp_path, 10)
    assert cluster.shown(job)["NumNodes"] == "2"
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert_went_on(cluster, job, tmp_path, whole)


def test_a_run_that_is_refused_is_a_failed_job(cluster, tmp_path):
    """Here for want of its data, of which only the nodes know."""
    script = write_script(tmp_path, "nproc=1", "data.files=/nowhere.bin")
    shown = cluster.await_state(cluster.submit(script), "FAILED", "COMPLETED")
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")


def test_a_run_that_dies_on_one_of_two_nodes_is_a_failed_job(cluster, tmp_path):
    job = cluster.submit(write_script(tmp_path, "nproc=1", "slurm.nodes=2", "steps=1000000", "schedule=constant"))
    await_steps(cluster, job, tmp_path, 10)
    workers = [p for p in cluster.processes() if "rowwise.launch.train" in " ".join(p.cmdline())]
    next(w for w in workers if w.environ()["RANK"] == "1").kill()
    shown = cluster.await_state(job, "FAILED", "COMPLETED")
    # Its exit code is the highest of its tasks: 1 of the one that failed, or 143 of the other, which Slurm ended.
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0")


def test_a_task_of_an_array_goes_on_alone(cluster, tmp_path):
    """Whichever of them: the id of one is that of the array, too."""
    array = cluster.submit(write_stand_in(tmp_path, "slurm.workers=2"))
    jobs = [f"{array}_1", f"{array}_2"]
    for job in jobs:
        cluster.await_state(job, "RUNNING")
        await_text(cluster, job, "begun")
    assert array in [cluster.shown(job)["JobId"] for job in jobs]
    for done, job in enumerate(jobs):
        cluster.run("scancel", "--signal=USR1", "--batch", job)
        cluster.await_state(job, "PENDING", restarts=1)
        assert [cluster.shown(other)["Restarts"] for other in jobs] == ["1", str(done)]
    for job in jobs:
        cluster.await_state(job, "COMPLETED")


def test_a_program_asked_before_it_hears_goes_on(cluster, tmp_path):
    """By its time limit or for a more urgent job; the signal kills it."""
    script = write_stand_in(tmp_path)
    for number, signal in enumerate(("USR1", "TERM")):
        job = cluster.submit(script, "--export=ALL,DEAF=1", f"--output={tmp_path}/log-{number}")
        await_text(cluster, job, "begun")
        if signal == "USR1":
            cluster.run("scancel", "--signal=USR1", "--batch", job)
        else:
            take_nodes(cluster)
        assert cluster.await_state(job, "COMPLETED", "FAILED", restarts=1)["JobState"] == "COMPLETED"


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    job = cluster.submit(write_stand_in(tmp_path))
    await_text(cluster, job, "begun")
    cluster.run("scancel", job)
    await_text(cluster, job, "asked by SIGTERM")
    time.sleep(3)
    shown = cluster.shown(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    assert not any("stand_in.py" in " ".join(p.cmdline()) for p in cluster.processes())


def test_slurm_leaves_no_process_behind():
    with slurm_cluster() as cluster:
        job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=srun sleep 600")
        cluster.await_state(job, "RUNNING")
    assert not cluster.processes()
    assert not [p for p in psutil.process_iter() if p.name().startswith("slurmstepd") and p.status() != "zombie"]
