"""What workers tell each other before and after a run: the configuration, a refusal, why it ended."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from commands import ENVIRONMENT, command, free_port, run
from rowwise.launch import workers as launch
from rowwise.launch.outcome import Refused
from rowwise.parallel.mesh import Workers
from runs import stores

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_refusal_is_told_before_the_store_may_end(world_size):
    """Rank 0, with whose process the store ends, stays until the slowest knows."""
    first, *others = stores(world_size)
    heard: dict[int, str] = {}

    def hear(workers: Workers) -> None:
        time.sleep(0.2 * workers.rank)
        with pytest.raises(Refused) as refusal:
            launch.hear(workers)
        heard[workers.rank] = str(refusal.value)

    threads = [threading.Thread(target=hear, args=(workers,)) for workers in others]
    for thread in threads:
        thread.start()
    launch.announce_end(first, Refused("steps=0: a run has at least 1 step"))
    del first  # and the store with it
    for thread in threads:
        thread.join()
    assert heard == {workers.rank: "steps=0: a run has at least 1 step" for workers in others}


def test_a_refusal_waits_for_a_worker_that_is_gone_as_long_as_it_must(monkeypatch):
    monkeypatch.setattr(launch, "_LISTENING", launch.datetime.timedelta(seconds=0.3))
    began = time.monotonic()
    launch.announce_end(stores(2)[0], Refused("no"))
    assert 0.2 < time.monotonic() - began < 5
    launch.announce_end(Workers(), Refused("no"))  # there are no others


def test_a_configuration_is_heard():
    first, other = stores(2)
    launch.announce(first, {"steps": 3})
    assert launch.hear(other) == {"steps": 3}


REFUSED = {
    "a mistyped key": (["optim.lrr=3"], r"refused: unknown key optim.lrr: .*did you mean optim.lr\?"),
    "data that is not there": (["data=text", "data.files=/nowhere"], r"refused: data.files: /nowhere names no file .*"),
    "a layout for more": (["parallel.shard=3"], r"refused: .*the world size is 2.*"),
}


@pytest.mark.full
@pytest.mark.parametrize("case", REFUSED)
def test_every_worker_that_was_started_by_itself_ends_with_the_reason(case, tmp_path):
    """Under env://, where the store is rank 0's and ends with it."""
    words, message = REFUSED[case]
    port, said = str(free_port()), []
    for rank in "01":
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **ENVIRONMENT, **place}
        program = [sys.executable, "-m", "rowwise.launch.train", *words]
        said.append(subprocess.Popen(program, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    for process in said:
        error = process.communicate(timeout=180)[1]
        assert re.fullmatch(message + "\n", error), error
        assert process.returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_under_torchrun_one_worker_speaks(tmp_path):
    """What torchrun itself says below is torchrun's: a worker's exit code 2 is a failure to it."""
    code, said = run(tmp_path, command(2, "-m", "rowwise.launch.train", "optim.lrr=3"))
    assert code != 0
    assert len([line for line in said.splitlines() if line.startswith("refused: unknown key optim.lrr")]) == 1
    assert re.search(r"exitcode *: *2 ", said), said
    assert "File" not in said.split("torch/distributed")[0].split("Traceback")[0]


def test_make_train_is_rowwise_train():
    """Whose refusals are one line, where torchrun's are 42."""
    words = ["make", "--dry-run", "--silent", "train", "WORKERS=3", "ARGS=optim.lrr=3", "PYTHON=true", "VENV=.venv"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[-1] == ".venv/bin/rowwise train nproc=3 optim.lrr=3"
