"""Every preset of conf/ that changes how a model learns, at its own numbers: it learns. Those of models that people know are what
their authors' config.json says, and learn too, of fewer numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hub_configs import CONFIGS

from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.config_json import read_shape
from rowwise.trainer.prepare import prepare
from runs import run_watched

CONF = Path(__file__).parents[1] / "conf"
QUIET = ["data=stdlib", "eval.every=0", "sample.tokens=0", "checkpoint.every=0", "checkpoint.background=false"]
# The tiny model on 128 tokens a step: twenty minutes of one core for all presets.
TINY = ["steps=200", "batch.global_size=2", "batch.micro_size=2", "batch.seq_len=64"]
# A few seconds, for every test run.
SMALLER = [
    *TINY,
    "steps=60",
    "batch.seq_len=32",
    "model.layers=1",
    "model.dim=64",
    "model.heads=2",
    "model.ffn_dim=128",
]
GROUPS = ("optim", "schedule", "sparsity", "precision")
PRESETS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
PRESETS.remove("schedule=lr_range")  # is to blow up: tests/test_trainer_lr_range.py
OURS = {"tiny", "llama_60m", "llama_130m", "llama_350m", "llama_1b"}  # models that nobody's folder holds
# What layers do is a preset's own: they turn, see, are normed and scaled as in it, with heads as wide.
FEWER = [
    "model.layers=6",
    "model.dim=256",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_dim=704",
    "model.vocab_size=256",
]


def preset(folder: Path, *overrides: str) -> TrainConfig:
    return prepare(config_from_tree(compose_tree([*QUIET, *overrides, f"run_dir={folder}/run"])), 1)


def learned(ranks, config: TrainConfig) -> tuple[float, float]:
    """The loss of the first step, and the mean of the last tenth's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ranks.TIMEOUT_SECONDS", 3600)  # 200 steps on a busy core
        ranks.run(run_watched, 1, config)
    losses = [record["loss"] for record in read_metrics(Path(config.run_dir))]
    assert len(losses) == config.steps
    return losses[0], float(np.mean(losses[-config.steps // 10 :]))


def test_every_preset_of_a_published_model_is_held_against_its_config_json():
    assert CONFIGS.keys() | OURS == {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_is_the_model_that_its_config_json_says(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    theirs, ours = read_shape(tmp_path), compose_tree([f"model={name}"])["model"]
    if ours["head_dim"] == ours["dim"] // ours["heads"]:
        ours["head_dim"] = None
    assert {key: ours[key] for key in theirs} == theirs
    assert ours["init_std"] == CONFIGS[name]["initializer_range"]


@pytest.fixture(scope="module")
def adamw(ranks, tmp_path_factory):
    return learned(ranks, preset(tmp_path_factory.mktemp("adamw"), *TINY))


@pytest.mark.long
@pytest.mark.parametrize("choice", PRESETS)
def test_every_preset_learns_half_of_what_adamw_does(ranks, tmp_path, adamw, choice, capsys):
    start, end = learned(ranks, preset(tmp_path, *TINY, choice))
    share = (start - end) / (adamw[0] - adamw[1])
    with capsys.disabled():
        print(f"\n| `{choice}` | {start:.3f} | {end:.3f} | {100 * share:.0f} % |", end="", flush=True)
    assert share >= 0.5


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_learns_half_of_what_the_tiny_one_does(ranks, tmp_path, adamw, name):
    start, end = learned(ranks, preset(tmp_path, *TINY, f"model={name}", *FEWER))
    assert start - end >= 0.5 * (adamw[0] - adamw[1])


def test_a_representative_learns_half_of_what_adamw_does(ranks, tmp_path):
    """Lion's rate and decay under wsd's phases, beside the defaults."""
    base, other = (
        preset(tmp_path / "adamw", *SMALLER),
        preset(tmp_path / "lion", *SMALLER, "optim=lion", "schedule=wsd"),
    )
    (start, end), (other_start, other_end) = learned(ranks, base), learned(ranks, other)
    assert end < start - 1
    assert other_start - other_end >= 0.5 * (start - end)
