"""A working directory full of modules that bear the names of others: no command and no worker imports one of them."""

import sys
from pathlib import Path

import pytest

from commands import overrides_of, run
from rowwise.launch.outcome import read_outcome
from rowwise.trainer.metrics import read_metrics

pytestmark = pytest.mark.long
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
ROWWISE = str(Path(sys.executable).with_name("rowwise"))
NAMES = (
    "tqdm", "json", "numpy", "torch", "argparse", "yaml", "omegaconf", "hydra", "psutil", "filelock", "optuna", "pickle",
    "traceback", "sitecustomize", "usercustomize", "triton", "tokenizers", "safetensors", "hydra_plugins/x", "hydra_plugins/__init__",
)  # fmt: skip


@pytest.fixture
def poisoned(tmp_path, monkeypatch) -> Path:
    """The working directory; whatever of it is imported leaves its name in `ran`."""
    for name in NAMES:
        path = tmp_path / "work" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + '\\n')\n")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    return tmp_path / "work"


def imported(poisoned: Path) -> str:
    ran = poisoned.with_name("ran")
    return ran.read_text() if ran.exists() else ""


def test_the_modules_there_would_run(poisoned):
    assert run(poisoned, [sys.executable, "-c", "import tqdm"])[0] == 0
    assert imported(poisoned) == "tqdm\n"


@pytest.mark.parametrize(
    "starter",
    [
        [ROWWISE, "train", "nproc=2"],
        [sys.executable, "-m", "rowwise.launch.cli", "train", "nproc=2"],
        [sys.executable, "-m", "rowwise.launch.start", "nproc=2"],
        [TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "rowwise.launch.train"],
        [sys.executable, "-m", "rowwise.launch.train"],
    ],
    ids=["rowwise", "the command as a module", "the agent", "torchrun", "one process"],
)
def test_a_run_imports_none_of_them(poisoned, tmp_path, starter):
    code, said = run(poisoned, [*starter, *overrides_of(tmp_path, "steps=2")])
    assert (code, imported(poisoned)) == (0, ""), said[-3000:]
    assert len(read_metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("search", [[], ["sweep.search=grid"]], ids=["multirun", "a search"])
def test_a_sweep_of_two_trials_imports_none_of_them(poisoned, tmp_path, search):
    words = [word for word in overrides_of(tmp_path, "steps=2") if not word.startswith("run_dir=")]
    sweep = [
        "sweep.name=two",
        f"sweep.folder={tmp_path}/sweep",
        "sweep.goal=loss",
        *search,
        "nproc=1",
        "optim.lr=1e-3,3e-3",
    ]
    code, said = run(poisoned, [ROWWISE, "sweep", *sweep, *words], timeout=240)
    assert (code, imported(poisoned)) == (0, ""), said[-3000:]
    ended = [read_outcome(tmp_path / "sweep" / f"trial-{number}") for number in (0, 1)]
    assert [outcome.state for outcome in ended if outcome is not None] == ["complete"] * 2


@pytest.mark.parametrize(
    "name", ["train", "start", "cli", "sweep", "export", "generate", "evaluate", "report", "schedule", "slurm"]
)
def test_no_command_imports_one(poisoned, name):
    assert run(poisoned, [sys.executable, "-m", f"rowwise.launch.{name}", "--help"])[0] == 0
    assert imported(poisoned) == ""
