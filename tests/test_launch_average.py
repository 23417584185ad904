"""`rowwise average`: the mean of checkpoints, by Fisher information, and mixed with a start; what is refused; runs go on from it."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from parity import global_batch, relative_error, small_config, with_layout
from rowwise.launch.average import STILL, main
from rowwise.launch.evaluate import EvaluateConfig, evaluate
from rowwise.launch.export import ExportConfig, export
from rowwise.launch.runs import open_run
from rowwise.optim import average
from rowwise.trainer.data.open import open_data
from rowwise.trainer.manifest import complete_checkpoints
from rowwise.trainer.metrics import read_metrics
from runs import final_tensors, named, run_train, tensors_in

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """Three checkpoints of two ranks that keep an average too."""
    folder = tmp_path_factory.mktemp("average")
    config = small_config(folder, "checkpoint.every=1", "checkpoint.keep=0", "average.ema=0.5", "optim.lr=0.05")
    config = named(with_layout(config, 2, zero=3), folder, "run")
    ranks.run(run_train, 2, config)
    return config


def checkpoints(config) -> list[dict[str, torch.Tensor]]:
    """What each holds, the oldest first."""
    return [tensors_in(path) for path in reversed(complete_checkpoints(Path(config.run_dir) / "checkpoints"))]


def test_the_mean_of_the_newest_is_a_run_that_is_evaluated_and_goes_on(run, ranks, tmp_path, capsys):
    to = tmp_path / "mean"
    assert main([f"run={run.run_dir}", "last=2", f"to={to}"]) == 0
    assert "the mean of steps 2, 3 ->" in capsys.readouterr().out
    one, other, made = *checkpoints(run)[1:], final_tensors(to)
    for name, tensor in made.items():
        expected = (one[name] + other[name]) / 2 if name.startswith("model.") else other[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-15, atol=1e-15)
    assert made.keys() == {name for name in other if not name.startswith("average.")}
    model = open_run(to).model()
    assert all(torch.equal(p, made[f"model.{name}"]) for name, p in model.named_parameters())
    assert evaluate(EvaluateConfig(run=str(to)))[0].loss != evaluate(EvaluateConfig(run=run.run_dir))[0].loss
    onward = small_config(tmp_path, f"resume={to}", "steps=4", "average.ema=0.5")
    ranks.run(run_train, 1, with_layout(onward, 1))
    assert [record["step"] for record in read_metrics(Path(onward.run_dir))] == [4]
    assert json.loads((to / "mean.json").read_text()) == {"run": run.run_dir, "steps": [2, 3], "fisher": False}


def test_numbers_count_by_their_fisher_information(run, tmp_path):
    """Of gradients as a textbook takes them, sample by sample of those that the run read first."""
    to = tmp_path / "fisher"
    assert main([f"run={run.run_dir}", "steps=1,3", "fisher=true", "samples=5", "device=cpu", f"to={to}"]) == 0
    held, made = checkpoints(run), final_tensors(to)
    data = open_data(run.data, run.batch.seq_len, run.model.vocab_size)
    batch = global_batch(run, data, 0)
    fishers = []
    for step in (1, 3):
        model = open_run(run.run_dir).model(step, "cpu", weights="last").requires_grad_(True)
        squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(5):
            row = slice(i, i + 1)
            documents = None if batch.documents is None else type(batch.documents)((batch.documents.begins[i],))
            logits = model(batch.inputs[row], batch.positions[row], documents)
            F.cross_entropy(logits[0], batch.labels[i].long(), reduction="sum").backward()
            for name, p in model.named_parameters():
                squares[name] += p.grad**2 / 5
            model.zero_grad()
        norm = sum((f**2).sum() for f in squares.values()) ** 0.5
        fishers.append({name: f.clamp_min(1e-6) / norm for name, f in squares.items()})
    for name in fishers[0]:
        a, b = (f[name] for f in fishers)
        expected = (a * held[0][f"model.{name}"] + b * held[2][f"model.{name}"]) / (a + b)
        assert relative_error(made[f"model.{name}"], expected) < 1e-9, name


@pytest.mark.parametrize("kind", ["a run", "a folder"])
def test_it_is_mixed_with_a_start(run, tmp_path, kind):
    start, first = f"{run.run_dir}/checkpoints/step-00000001", checkpoints(run)[0]
    if kind == "a folder":  # in 32 bits
        export(ExportConfig(run=run.run_dir, to=f"{tmp_path}/theirs", checkpoint="1", weights="last"))
        start = f"{tmp_path}/theirs"
    else:  # whose average is meant
        first = {name.replace("average.", "model."): t for name, t in first.items() if name.startswith("average.")}
    to = tmp_path / "mixed"
    assert main([f"run={run.run_dir}", "last=1", f"start={start}", "share=0.25", f"to={to}"]) == 0
    newest, made = checkpoints(run)[2], final_tensors(to)
    for name in (name for name in newest if name.startswith("model.")):
        expected = 0.25 * newest[name] + 0.75 * first[name]
        assert relative_error(made[name], expected) < (1e-6 if kind == "a folder" else 1e-12), name


REFUSED = {
    "neither": ([], r"give one of last=N and steps=10,20"),
    "both": (["last=1", "steps=1"], r"give one of last=N and steps=10,20"),
    "too many": (["last=9"], r"last=9: run=.* has 3 checkpoints; give at most that"),
    "no such step": (["steps=7"], r"steps=7: not one of run="),
    "a share of nothing": (["last=2", "share=0.5"], r"share=0.5: nothing reads it without start=PATH"),
    "samples of nothing": (["last=2", "samples=4"], r"samples=4: nothing reads it without fisher=true"),
    "no start": (["last=2", "start=/nowhere"], r"/nowhere"),
    "more than all": (["last=2", "start=/nowhere", "share=2"], r"share=2"),
}


def test_what_it_says_of_masks_is_what_a_run_says():
    assert STILL == average.STILL


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(run, tmp_path, capsys, case):
    words, said = REFUSED[case]
    assert main([f"run={run.run_dir}", f"to={tmp_path}/to", *words]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("refused: ") and refused.count("\n") == 1
    assert re.search(said, refused), refused
    assert not list(tmp_path.glob("to*"))
