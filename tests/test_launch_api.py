"""Rowwise from Python: `rowwise.launch.api`, and every block of docs/python.md."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from commands import free_port
from parity import small_config
from rowwise.launch import leaving
from rowwise.launch.api import compose, open_run, train
from rowwise.parallel.mesh import Workers
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.lock import lock_run
from runs import assert_same_run, named

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own reading

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """In one process, as in a notebook: two runs, one after the other."""
    monkeypatch.chdir(tmp_path)
    left: list[Path] = []
    monkeypatch.setattr(leaving, "_written", left.append)  # a process of its own, and tested elsewhere
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert [record["step"] for record in names["run"].records] == [1, 2, 3, 4, 5, 6]
    assert names["run"].standing.state == "complete" and not dist.is_initialized()
    assert [folder.name for folder in left] == ["first", "first"], "a run leaves no report"
    assert "complete" in capsys.readouterr().out


def trained(workers: Workers, config: TrainConfig, port: int) -> int:
    """A process of a script under torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    numbers = (workers.rank, workers.world_size, workers.rank, workers.world_size, "localhost", port)
    before = dict(os.environ)
    os.environ.update({name: str(number) for name, number in zip(names, numbers, strict=True)})
    try:
        return train(config).step
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_script_of_two_processes_is_the_run_of_one(ranks, tmp_path):
    """In float64; the configuration is resolved by rank 0 alone."""
    more = ["report=never", "eval.every=1", "eval.batches=1", "checkpoint.every=2", "batch.micro_size=6"]
    config = small_config(tmp_path, *more)
    assert ranks.run(trained, 2, named(config, tmp_path, "two"), free_port()) == [3, 3]
    assert train(named(config, tmp_path, "one")).step == 3
    assert_same_run(str(tmp_path / "two"), str(tmp_path / "one"))
    assert open_run(tmp_path / "two").settings["parallel"]["shard"] == 2


def test_words_are_those_of_the_command(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 7\nclip_norm: 0.5\n")
    config = compose([f"config={tmp_path / 'mine.yaml'}", "optim=lion", "steps=9"])
    assert (config.optim.name, config.clip_norm, config.steps) == ("lion", 0.5, 9)


def test_what_is_refused_is_a_value_error_of_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key optim.learning"):
        compose(["optim.learning=1"])
    with pytest.raises(ValueError, match=r"give a list of words, such as \['steps=3'\]"):
        compose("steps=3")
    config = small_config(tmp_path)
    with pytest.raises(ValueError, match="nproc=2, but 1 workers were started"):
        train(replace(config, nproc=2))
    with pytest.raises(ValueError, match=r"batch.global_size=24 does not divide"):
        train(replace(config, batch=replace(config.batch, micro_size=5)))
    assert not Path(config.run_dir).exists()
    Path(config.run_dir).mkdir()
    lock = lock_run(Path(config.run_dir))
    with pytest.raises(ValueError, match="in use by another run"):
        train(config)
    lock.release()


def test_a_run_that_fails_says_why_and_leaves_the_process_as_it_was(tmp_path):
    config = small_config(tmp_path, "report=never", "clip_norm=0", "optim.lr=1e300", "steps=3", "checkpoint.every=1")
    with pytest.raises(RuntimeError, match="not a number: "):
        train(config)
    assert not dist.is_initialized()
    assert train(small_config(tmp_path, "report=never", f"run_dir={tmp_path}/next", "steps=1")).step == 1


def test_only_the_main_thread_trains(tmp_path):
    said: list[str] = []

    def call() -> None:
        try:
            train(small_config(tmp_path))
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert said == ["train is called in another thread than the main one, which alone hears signals; call it there"]


def test_the_interface_itself_needs_no_torch():
    program = "import rowwise.launch.api, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
