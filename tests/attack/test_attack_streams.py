"""`rowwise train` whose output goes nowhere, into a pipe that nobody reads, or to a terminal that hangs up: the records are kept."""

import os
import signal
import subprocess
import sys

import pytest

from commands import ENVIRONMENT, await_steps, overrides_of, start
from rowwise.launch.outcome import Outcome, read_outcome
from rowwise.trainer.metrics import read_metrics

pytestmark = pytest.mark.long

TRAIN = [sys.executable, "-m", "rowwise.launch.cli", "train"]
STEPS = 12


@pytest.mark.parametrize("how", [">&-", "2>&-", "<&- >&- 2>&-", "| head -1", "2>&1 | head -1", "2>/dev/full"])
def test_nobody_reads(tmp_path, how):
    words = " ".join(f"'{word}'" for word in [*TRAIN, *overrides_of(tmp_path, "nproc=2", f"steps={STEPS}")])
    environment = {**os.environ, **ENVIRONMENT}
    command = ["bash", "-c", f"set -o pipefail; {words} {how}"]
    subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, timeout=600, check=True)
    assert read_outcome(tmp_path / "run") == Outcome("complete", None, STEPS)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_full_pipe(tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    command = [*TRAIN, *overrides_of(tmp_path, "nproc=2", f"steps={STEPS}")]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=write, stderr=write, timeout=600, check=False)
    os.close(write)
    os.close(read)
    assert done.returncode == 0
    assert read_outcome(tmp_path / "run") == Outcome("complete", None, STEPS)


def test_a_terminal_that_hangs_up(tmp_path):
    job = start(tmp_path, [*TRAIN, *overrides_of(tmp_path, "nproc=2", "steps=1000000", "schedule=constant")])
    await_steps(tmp_path, 3, job)
    job.send_signal(signal.SIGHUP)
    assert job.wait(300) == 0
    reached = len(read_metrics(tmp_path / "run"))
    assert read_outcome(tmp_path / "run") == Outcome("stopped", "asked to stop", reached)
