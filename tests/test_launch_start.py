"""`rowwise train` starts and watches workers: restarts, signals, how a run ended, and what is refused."""

import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from commands import PATIENCE, AtOnce, await_steps, free_port, overrides_of, run_in_pool, start, workers_of
from rowwise.launch import agent, cli, ranks, train
from rowwise.launch import rendezvous as rendezvous_module
from rowwise.launch import start as launcher
from rowwise.launch.elastic import failure_of
from rowwise.launch.job import Job
from rowwise.launch.outcome import Outcome, read_outcome, write_outcome
from rowwise.launch.rendezvous import TOKEN, Rendezvous, is_here, slurm_rendezvous
from rowwise.launch.utf8 import insist_on_utf8
from rowwise.launch.warm import Unanswered
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.stop import ASKED
from runs import records

TRAIN = [sys.executable, "-m", "rowwise.launch.start"]


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_and_nothing_is_lost(ranks, tmp_path):
    overrides = overrides_of(
        tmp_path, "steps=1000000", "schedule=constant", "schedule.warmup_steps=0", "checkpoint.every=4", "nproc=2"
    )
    job = start(tmp_path, [*TRAIN, "--max-restarts", "1", *overrides])
    await_steps(tmp_path, 9, job)
    workers_of(job)[-1].kill()
    reached = len(read_metrics(tmp_path / "run"))
    await_steps(tmp_path, reached + 3, job)
    assert "resumed from" in (tmp_path / "log").read_text()
    job.send_signal(signal.SIGUSR1)  # as Slurm does some time before a limit
    assert job.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    stopped_at = len(read_metrics(tmp_path / "run"))
    assert read_outcome(tmp_path / "run") == Outcome("stopped", "asked to stop", stopped_at)
    overrides[-1], steps = "nproc=null", f"steps={stopped_at + 2}"
    run_in_pool(ranks, [*overrides, steps])
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, stopped_at + 3))
    run_in_pool(ranks, [*overrides, steps, f"run_dir={tmp_path}/whole"])
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.slow
def test_how_it_ended_is_written_and_a_run_under_way_is_left_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    overrides = overrides_of(tmp_path, "steps=2", "nproc=1")
    assert launcher.main(["--log-dir", str(tmp_path / "logs"), *overrides]) == 0
    assert read_outcome(tmp_path / "run") == Outcome("complete", None, 2)
    assert list((tmp_path / "logs").glob("*/attempt_0/0/stderr.log"))
    capfd.readouterr()
    with FileLock(tmp_path / "run/.lock"):  # another run is in the same folder
        assert launcher.main([*overrides, "steps=3"]) == 2
    assert "is in use by another run" in capfd.readouterr().err
    assert read_outcome(tmp_path / "run") == Outcome("complete", None, 2)
    overrides = [*overrides, "data.files=/nowhere.bin"]
    assert launcher.main(overrides) == 2
    assert re.fullmatch(r"refused: data.files: /nowhere.bin names no file .*\n", capfd.readouterr().err), (
        "one line, though a worker found it"
    )
    assert read_outcome(tmp_path / "run") == Outcome("complete", None, 2)  # of the run that is there
    (tmp_path / "other").mkdir()
    assert launcher.main(["--log-dir", str(tmp_path / "logs"), *overrides, f"run_dir={tmp_path}/other"]) == 2
    refused = read_outcome(tmp_path / "other")
    assert refused is not None and refused.state == "refused"
    assert refused.reason in capfd.readouterr().err and "/nowhere.bin" in refused.reason


REFUSED = {
    "no rank": (["nproc=0"], "nproc=0"),
    "a layout for more": (["nproc=1", "parallel.shard=2"], "start 2 workers"),
    "a layout for another number of machines": (
        ["--nodes", "1:2", "--rendezvous", "localhost:1", "nproc=1", "parallel.shard=2"], "start 2 workers"
    ),
    "machines that do not meet": (["--nodes", "2", "nproc=1"], "give --rendezvous HOST:PORT"),
    "no such number of machines": (["--nodes", "2:1", "--rendezvous", "localhost:1", "nproc=1"], "give a number of machines"),
    "a rendezvous without a port": (["--nodes", "2", "--rendezvous", "a", "nproc=1"], "give --rendezvous HOST:PORT"),
    "a rendezvous nowhere": (["--nodes", "2", "--rendezvous", "no.such.host:1", "nproc=1"], "cannot be reached from here"),
    "a port that cannot be": (["--rendezvous", "localhost:99999", "nproc=1"], "with a port of 1 to 65535"),
    "any port": (["--rendezvous", "localhost:0", "nproc=1"], "with a port of 1 to 65535"),
    "a token of no user": (
        ["--rendezvous", "localhost:1", "--token", "~no.such/x", "nproc=1"], "there is no such user's home"
    ),
    "a token for nobody": (["--token", "/dev/null", "nproc=1"], "give --rendezvous HOST:PORT too"),
    "fewer restarts than none": (["--max-restarts", "-1", "nproc=1"], "give 0 or more"),
    "an unknown key": (["optim.lrr=3"], "did you mean optim.lr?"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_worker_is_started(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agent, "run_workers", None)
    monkeypatch.setattr(launcher, "warmed", lambda lent: nullcontext(AtOnce()))
    monkeypatch.setenv(TOKEN, "of this job and of no other")
    words, said = REFUSED[case]
    assert launcher.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("refused: ")
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


class KilledFork:
    """A warm process whose fork was killed."""

    def ask(self, call: str, *arguments: object) -> None:
        raise Unanswered("a process that was forked ended by signal 9 (Killed)")


def test_a_fork_that_is_killed_before_it_answers_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "warmed", lambda lent: nullcontext(KilledFork()))
    assert launcher.main(["nproc=1"]) == 1
    assert capsys.readouterr().err == "failed: a process that was forked ended by signal 9 (Killed)\n"


CROWDED = {
    "the example of a long context": (["nproc=4", "experiment=long_context"], 2),
    "one more than cores": (["nproc=3", "batch.global_size=24"], 2),
    "two workers of one core": (["nproc=2"], 1),
    "very many": (["nproc=64", "batch.global_size=512"], 63),
}


@pytest.mark.parametrize("case", CROWDED)
def test_more_workers_than_cores_are_a_warning(case, monkeypatch, capsys):
    words, cores = CROWDED[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(launcher, "warmed", lambda lent: nullcontext(AtOnce()))
    monkeypatch.setattr(agent, "run_here", lambda job, warm, attend: None)
    assert launcher.main(words) == 0
    warning, stopped = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {words[0]} on {cores} cores: ")
    assert stopped == "stopped before the first step: there was nothing to save"
    assert agent.crowding(cores, 0) is None


def test_more_workers_than_gpus_are_refused(monkeypatch, capsys):
    """NCCL gives each a GPU of its own; cores do not matter."""
    monkeypatch.setattr(launcher, "warmed", lambda lent: nullcontext(AtOnce()))
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: 2)
    assert launcher.main(["nproc=3", "batch.global_size=24"]) == 2
    assert capsys.readouterr().err == (
        "refused: nproc=3: this machine has 2 GPUs; give nproc=2 at most, or more machines\n"
    )
    assert agent.crowding(len(os.sched_getaffinity(0)) + 1, 2) is None


def test_workers_that_are_fewer_than_nproc_are_refused(tmp_path, capsys):
    """torchrun was told otherwise."""
    assert train.main(overrides_of(tmp_path, "nproc=2")) == 2
    assert "nproc=2, but 1 workers were started on this machine" in capsys.readouterr().err


def test_where_the_machines_of_a_slurm_step_meet(monkeypatch, tmp_path):
    monkeypatch.setattr(rendezvous_module, "slurm_hosts", lambda nodes: {"gpu[3-4]": ["gpu3", "gpu4"]}[nodes])
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[3-4]",
            "SLURM_JOB_ID": "41234", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}  # fmt: skip
    with pytest.raises(ValueError, match=r"^2 machines: .* make a token with .* or set ROWWISE_TOKEN"):
        slurm_rendezvous(None, step)
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text("of this job and of its file")
    met = slurm_rendezvous(tmp_path / "token", step)
    assert met is not None and met.token == b"of this job and of its file", "as the refusal has it"
    step[TOKEN] = "of this job and of no other"
    token = step[TOKEN].encode()
    assert slurm_rendezvous(None, step) == Rendezvous("gpu3:21234", "slurm-41234-0", 2, 2, host=False, token=token)
    rendezvous = slurm_rendezvous(None, step | {"SLURM_NODEID": "0"})
    assert rendezvous is not None and rendezvous.host and "of this job" not in repr(rendezvous)
    assert slurm_rendezvous(None, {}) is None
    assert slurm_rendezvous(None, step | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^scontrol, which names the machines of gpu\[3-4\], is not here, or"):
        slurm_rendezvous(None, step | {"SLURM_STEP_NODELIST": "gpu[3-4]"})
    with pytest.raises(ValueError, match="give Slurm --ntasks-per-node=1"):
        slurm_rendezvous(None, step | {"SLURM_STEP_NUM_TASKS": "16"})


def test_options_and_overrides_mix():
    options = launcher.parse(["nproc=1", "--max-restarts", "1", "steps=3", "--nodes=1"])
    assert (options.overrides, options.max_restarts) == (["nproc=1", "steps=3"], 1)


def test_a_trial_in_a_step_of_many_machines_has_one(monkeypatch):
    for key in ("NODES", "TASKS"):
        monkeypatch.setenv(f"SLURM_STEP_NUM_{key}", "2")
    assert rendezvous_module.rendezvous_of(launcher.parse(["--nodes=1"])) is None


def test_threads_are_shared_out_and_forgotten(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for nproc, threads in ((2, "1"), (1, str(len(os.sched_getaffinity(0))))):
        with agent._environment(agent.Job((), Path(), 1, nproc)):
            assert os.environ["OMP_NUM_THREADS"] == threads
        assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with agent._environment(agent.Job((), Path(), 1, 2)):
        assert os.environ["OMP_NUM_THREADS"] == "5"


def test_the_token_is_no_worker_s(monkeypatch):
    """Nor what a worker starts, which may send its environment elsewhere."""
    monkeypatch.setenv(TOKEN, "of this job and of no other")
    for rendezvous in (None, Rendezvous("host:1", "job", 1, 2, host=True, token=b"")):
        with agent._environment(agent.Job((), Path(), 1, 2, rendezvous)):
            assert TOKEN not in os.environ
        assert os.environ[TOKEN] == "of this job and of no other", "of the next trial"


def test_a_worker_that_leaves_as_it_is_asked_to_is_no_error():
    gone = psutil.Popen([sys.executable, "-c", ""])
    gone.wait()
    forwarding = agent.Forwarding()
    forwarding.requested = signal.SIGTERM
    forwarding.pass_on([gone])


def test_python_is_asked_for_utf8_once(monkeypatch):
    begun: list[list[str]] = []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    monkeypatch.setattr(os, "execv", lambda program, words: begun.append(words))
    monkeypatch.setenv("PYTHONUTF8", "0")
    insist_on_utf8()
    insist_on_utf8()
    assert len(begun) == 1, "where it does not listen, it is not asked for ever"


def test_workers_of_one_machine_stay_on_its_loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    rendezvous = Rendezvous("host:1", "job", 1, 2, host=True, token=b"")
    for of_many, interface in ((None, "lo"), (rendezvous, "eth7")):
        with agent._environment(agent.Job((), Path(), 1, 2, of_many)):
            assert os.environ["GLOO_SOCKET_IFNAME"] == interface
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7" and "NCCL_SOCKET_IFNAME" not in os.environ


def test_which_machine_hosts_the_meeting():
    assert is_here("localhost", 1)
    assert is_here("127.0.0.2", 1)
    assert not is_here("192.0.2.1", 1)  # of a network for examples
    with pytest.raises(ValueError, match="cannot be reached from here"):
        is_here("no.such.host", 1)


def test_the_cause_that_another_machine_wrote_stays(tmp_path):
    """A worker there ran out of memory; here they failed for want of it."""
    began = time.time() - 1
    write_outcome(tmp_path, Outcome("failed", "out of memory: 120 TB", 3))
    assert agent._better_said(tmp_path, Outcome("failed", "Connection closed by peer", 3), began)
    assert not agent._better_said(tmp_path, Outcome("complete", None, 9), began)
    assert not agent._better_said(tmp_path, Outcome("failed", "Connection closed by peer", 3), time.time() + 9)


def test_what_torch_says_where_memory_runs_out(tmp_path, monkeypatch):
    """And leaves in the file in which a worker's exception comes to the agent: a petabyte."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(RuntimeError) as found:
        torch.empty(10**15)
    ErrorHandler().record_exception(found.value)
    state, reason = agent._why(failure_of(ProcessFailure(0, os.getpid(), 1, str(tmp_path / "error.json"))))
    assert state == "failed"
    assert re.match("out of memory: .*can't allocate memory: you tried to allocate 4000000000000000 bytes", reason)


def test_a_job_that_is_asked_to_stop_before_its_machines_have_met_leaves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agent, "PATIENCE_SECONDS", 1.0)
    job = Job(
        (), tmp_path, 5, 1, Rendezvous(f"localhost:{free_port()}", "alone", 2, 2, host=True, token=b"of this job")
    )
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert agent.run_workers(job) == Outcome("stopped", "asked to stop", 0)
    assert capsys.readouterr().err == f"{ASKED}\n", "at once, and once"


def test_the_command_says_what_there_is(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"rowwise {name} " in said, "an example for each"
        with pytest.raises(SystemExit) as leaving:
            cli.main([name, "--help"])
        assert leaving.value.code == 0
        assert name in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "possible are train, check" in capsys.readouterr().err


def test_an_outcome_survives_the_disk(tmp_path: Path):
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, Outcome("failed", "why", 7))
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"state": "failed", "reason": "why", "step": 7}
    assert read_outcome(tmp_path) == Outcome("failed", "why", 7)
