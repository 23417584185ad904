"""A run read as a value: `rowwise.launch.runs`."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from parity import small_config, with_layout
from rowwise.launch import runs as reading
from rowwise.launch.checkpoints import Sound, choose_sound
from rowwise.launch.runs import Run, open_run
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.metrics import read_metrics
from runs import final_tensors, run_train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own reading


@pytest.fixture(scope="module")
def config(ranks, tmp_path_factory) -> TrainConfig:
    """A finished run of three steps on two ranks, ZeRO 3, each step saved."""
    words = ["steps=3", "checkpoint.every=1", "checkpoint.keep=2", "eval.every=2", "batch.global_size=8"]
    config = with_layout(small_config(tmp_path_factory.mktemp("runs"), *words), 2, zero=3)
    ranks.run(run_train, 2, config)
    return config


@pytest.fixture
def run(config) -> Run:
    return open_run(config.run_dir)


def test_a_run_is_what_its_files_say(run, config):
    assert run.name == "run" and run.step == 3
    assert run.config == config
    assert run.settings["optim"]["lr"] == config.optim.lr and run.settings["parallel"]["zero"] == 3
    assert run.records == read_metrics(Path(config.run_dir))
    assert [checkpoint.step for checkpoint in run.checkpoints] == [2, 3]
    assert run.checkpoints[1].path.name == "step-00000003"


def test_records_are_columns_of_one_length(run):
    table = run.table()
    assert table["step"] == [1, 2, 3] and table["eval_loss"][0] is None and table["eval_loss"][1] > 0
    assert table.keys() == {name for record in run.records for name in record}
    assert run.table("loss", "step") == {"loss": table["loss"], "step": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"no record of .*run has los, perplexity; possible are step, loss"):
        run.table("los", "perplexity")


def test_the_model_of_a_step_is_whole(run):
    saved = {name: tensor for name, tensor in final_tensors(run.folder).items() if name.startswith("model.")}
    for model in (run.model(device="cpu"), run.model(3, "cpu"), open_run(run.checkpoints[1].path).model(device="cpu")):
        assert not model.training and {f"model.{name}" for name, _ in model.named_parameters()} == saved.keys()
        for name, p in model.named_parameters():
            assert torch.equal(p, saved[f"model.{name}"]) and not p.requires_grad
    assert not torch.equal(run.model(2, "cpu").head.weight, saved["model.head.weight"])
    assert run.model(device="cpu", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("what", [".metadata", "__1_0.distcp"])
def test_a_checkpoint_that_goes_while_it_is_read_is_named(run, tmp_path, monkeypatch, what):
    """As a run that goes on removes its oldest."""
    copy = open_run(shutil.copytree(run.folder, tmp_path / "run"))

    def then_gone(*words: Any) -> Sound:
        sound = choose_sound(*words)
        (sound.path / what).unlink()
        return sound

    monkeypatch.setattr(reading, "choose_sound", then_gone)
    with pytest.raises(ValueError, match=r"step-00000003.*No such file or directory"):
        copy.model(device="cpu")


def test_a_checkpoint_is_its_run(run, config):
    of_step = open_run(run.checkpoints[0].path)
    assert of_step.folder == Path(config.run_dir).resolve() and of_step.settings == run.settings
    with pytest.raises(ValueError, match="step=3: not one of run="):
        of_step.model(3)


def test_how_a_run_stands(run):
    assert run.standing.state == "complete" and run.standing.step == 3
    with FileLock(run.folder / ".lock"):
        assert run.standing.state == "running"


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"runx: there is no checkpoint; possible are .*run"):
        open_run(f"{run.folder}x")
    for text, why in (("a: [", "is no YAML"), ("a: &b 1\nc: *b", "an anchor of YAML is not read")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"config.yaml.*{why}"):
            _ = open_run(tmp_path).settings
    with pytest.raises(ValueError, match="there is no checkpoint"):
        open_run(tmp_path).model()


def test_to_read_a_run_needs_no_torch(run):
    program = (
        "import sys; from rowwise.launch.runs import open_run; run = open_run(sys.argv[1]);"
        "print(run.standing.state, run.table('step')['step'], run.settings['steps'], len(run.checkpoints), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run.folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "complete [1, 2, 3] 3 2 False\n"
