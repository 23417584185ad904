"""Every preset of conf/ that changes how a model learns, at its own numbers: it learns."""

from pathlib import Path

import numpy as np
import pytest

from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.metrics import read_metrics
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


def test_a_representative_learns_half_of_what_adamw_does(ranks, tmp_path):
    """Lion's rate and decay under wsd's phases, beside the defaults."""
    base, other = (
        preset(tmp_path / "adamw", *SMALLER),
        preset(tmp_path / "lion", *SMALLER, "optim=lion", "schedule=wsd"),
    )
    (start, end), (other_start, other_end) = learned(ranks, base), learned(ranks, other)
    assert end < start - 1
    assert other_start - other_end >= 0.5 * (start - end)
