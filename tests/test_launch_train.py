"""The command itself, under a real torchrun: refusals, errors, signals, a killed worker."""

import signal
import subprocess
import sys

import pytest

from commands import PATIENCE, await_steps, command, overrides_of, run, run_in_pool, start, workers_of
from rowwise.launch.outcome import read_outcome
from rowwise.trainer.metrics import read_metrics
from runs import SAME_EVERYWHERE, records

FAILING = """
import sys
from rowwise.launch import train as launch
from rowwise.trainer import update as trainer

compute = trainer.compute_gradients
def fail_on_rank_one(engine, mesh, *rest):
    if mesh.rank == 1:
        raise RuntimeError("the second rank has had enough")
    return compute(engine, mesh, *rest)
trainer.compute_gradients = fail_on_rank_one
launch.run()
"""


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_job_with_its_traceback(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    words = overrides_of(tmp_path, "steps=50", f"parallel.timeout_seconds={10 * PATIENCE}")
    code, said = run(tmp_path, command(2, "failing.py", *words))  # and waits for no other rank's time to run out
    assert code == 1
    assert "RuntimeError: the second rank has had enough" in said
    assert "fail_on_rank_one" in said


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGINT, None), *(pytest.param(n, 2, marks=pytest.mark.full) for n in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_signal_saves_and_leaves_and_the_run_goes_on(ranks, tmp_path, number, workers):
    """To its end. One process needs no torchrun. SIGTERM is what our own agent sends: tests/test_launch_start.py."""
    options = ("steps=1000000", "schedule=constant", "schedule.warmup_steps=0", "checkpoint.every=0", "report=always")
    overrides = overrides_of(tmp_path, *options)
    program = ["-m", "rowwise.launch.train", *overrides]
    job = start(tmp_path, command(workers, *program) if workers else [sys.executable, *program])
    await_steps(tmp_path, 3, job)
    (workers_of(job)[0] if workers else job).send_signal(number)
    code, said = job.wait(PATIENCE), (tmp_path / "log").read_text()
    assert code == 0, said[-3000:]
    assert "asked to stop: saved step" in said
    stopped_at = len(read_metrics(tmp_path / "run"))
    assert stopped_at >= 3
    outcome = read_outcome(tmp_path / "run")
    assert outcome is not None and (outcome.state, outcome.step) == ("stopped", stopped_at)
    assert "<strong>stopped</strong>" in (tmp_path / "run/report.html").read_text()
    assert "resumed from" in run_in_pool(ranks, [*overrides, f"steps={stopped_at + 5}"])
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, stopped_at + 6))


@pytest.mark.full  # what our own agent makes of it, and what a killed run goes on from: test_launch_start, test_trainer_crash
def test_a_worker_killed_under_torchrun(ranks, tmp_path):
    overrides = overrides_of(
        tmp_path, "steps=1000000", "schedule=constant", "schedule.warmup_steps=0", "checkpoint.every=5"
    )
    job = start(tmp_path, command(2, "-m", "rowwise.launch.train", *overrides))
    await_steps(tmp_path, 12, job)
    workers_of(job)[-1].kill()
    assert job.wait(PATIENCE) != 0
    overrides += [f"steps={len(read_metrics(tmp_path / 'run')) + 5}"]
    assert "resumed from" in run_in_pool(ranks, overrides)
    interrupted = records(tmp_path / "run")
    run_in_pool(ranks, [*overrides, f"run_dir={tmp_path}/whole"])
    assert interrupted == records(tmp_path / "whole")
    assert len(interrupted[0]) == len(SAME_EVERYWHERE)


@pytest.mark.slow
def test_a_name_outside_ascii_under_a_locale_of_ascii(tmp_path, full):
    """What such a locale hands to a program is half a character each; files would get other names than elsewhere."""
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PATH": "/bin"}
    for module in ("cli", "train", *["start"] * full):  # which the first begins
        program = [
            sys.executable,
            "-m",
            f"rowwise.launch.{module}",
            *["train"] * (module == "cli"),
            "--cfg",
            "name='é漢'",
        ]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.stdout.decode().startswith("name: é漢\nrun_dir: runs/é漢\n"), done.stderr.decode()


def test_no_module_of_the_working_directory_is_imported(tmp_path):
    """All of them, in all commands: tests/attack/test_working_directory.py."""
    for name in ("argparse", "omegaconf", "sitecustomize", "hydra_plugins"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n")
    program = [sys.executable, "-m", "rowwise.launch.train", "--cfg", "steps=3"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "\nsteps: 3\n" in done.stdout and not (tmp_path / "ran").exists(), done.stderr
