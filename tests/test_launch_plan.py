"""`rowwise plan` says what a run needs on devices that are not here, and what fits."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rowwise.launch import plan
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.plan.devices import DEVICES

ROOT = Path(__file__).parents[1]

SMALL = ["model=llama_130m", "precision=bf16", "batch.global_size=64", "device=rtx3090", "world_size=4"]


def test_a_plan_is_told(capsys, tmp_path):
    assert plan.main([*SMALL, "parallel.pipeline=2", "parallel.zero=1", f"to={tmp_path / 'plan.png'}"]) == 0
    said = capsys.readouterr().out
    for part in (
        "4 x rtx3090: pipeline of 2 (1f1b)",
        "fits",
        "activations",
        "rank  layers",
        "tokens a second and device",
    ):
        assert part in said, part
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_exit_code_1(capsys):
    assert plan.main(["model=llama3_8b", "batch.global_size=8", "device=rtx3090", "world_size=1"]) == 1
    assert "does not fit, by" in capsys.readouterr().out


def test_fitting_prints_overrides_to_paste(capsys):
    assert plan.main([*SMALL, "fit=true", "parallel.zero=1"]) == 0
    said = capsys.readouterr().out
    words = next(line for line in said.splitlines() if line.startswith("  batch.micro_size=")).split()
    assert "parallel.zero=1" not in words, "what was given"
    assert "what each option costs and saves" in said and "runners-up" in said
    capsys.readouterr()
    assert plan.main([*SMALL, "parallel.zero=1", *words]) == 0


def test_what_a_file_gives_stays_too(capsys, tmp_path):
    """As what the command line gives: it is not searched, and not among what is printed to paste."""
    (tmp_path / "mine.yaml").write_text(
        "parallel: {zero: 1}\nmemory: {recompute: full, offload_activations: none, compress: none}\n"
    )
    assert plan.main([*SMALL, "fit=true", f"config={tmp_path / 'mine.yaml'}"]) == 0
    said = capsys.readouterr().out
    words = said.partition("as overrides:\n")[2].splitlines()[0].split()
    assert words and not [word for word in words if word.startswith(("parallel.zero", "memory."))]
    assert "ZeRO-1" in said


def documented() -> list[str]:
    texts = [plan.__doc__ or "", (ROOT / "README.md").read_text(), (ROOT / "docs/planning.md").read_text()]
    lines = [line.strip().split("   ")[0] for text in texts for line in text.splitlines()]
    return sorted({line for line in lines if line.startswith("rowwise plan ") and "=" in line})


@pytest.mark.parametrize("line", documented())
def test_what_is_documented_is_planned(line, capsys, tmp_path, monkeypatch):
    """As it stands, but that layouts are not searched, which takes seconds for the largest; a device of one's own is h100's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(asdict(DEVICES["h100"])))
    words = line.split()[2:]
    if "fit=true" in words:
        words = [*(word for word in words if word != "fit=true"), "batch.micro_size=1"]
    assert plan.main(words) in (0, 1), capsys.readouterr().err


BENCHMARKS = ROOT / "benchmarks"
ANSWERS = json.loads((BENCHMARKS / "results/largest_llamas.json").read_text())["answers"]


@pytest.fixture
def llamas(monkeypatch) -> ModuleType:
    """benchmarks/largest_llamas.py, which found the answers and tells them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("largest_llamas")


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer["asked"])
def test_what_is_said_to_fit_is_what_is_forecast_today(answer, llamas):
    """And of the largest, that a layer more does not fit."""
    today = llamas.again(answer)
    assert llamas.needs(today) == llamas.needs(answer) and today["needed_bytes"] <= today["limit_bytes"]
    if answer["asked"].startswith("the largest"):
        config = config_from_tree(compose_tree(answer["words"]))
        more = {"layers": config.model.layers + 1}
        assert not llamas.fit_at_least(llamas.least(config, answer["world_size"]), more, answer["device"])


@pytest.mark.parametrize("page", ["README.md", "docs/planning.md"])
def test_what_is_said_to_fit_is_what_was_found(page, llamas):
    assert llamas.BEGINS + llamas.PAGES[page](ANSWERS) + llamas.ENDS in (ROOT / page).read_text()


REFUSED = {
    "a device": (["device=h101"], "possible are h100"),
    "a device's file": (["device=gone.yaml"], "device=gone.yaml: there is no such file; give a YAML of name, memory"),
    "a key": (["worldsize=3"], "worldsize"),
    "a number of workers": (["world_size=0"], "1 or more"),
    "a picture": (["to=plan.gif"], ".png"),
    "a run": (["model=tiny", "world_size=3"], "does not divide into 3 data-parallel ranks"),
    "a limit": (["memory.limit=-1", "world_size=1"], "memory.limit=-1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, capsys):
    words, why = REFUSED[case]
    assert plan.main(words) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("refused: ") and why in said.err and said.err.count("\n") == 1


def test_help_and_refusals_do_not_wait_for_torch():
    code = "import sys; from rowwise.launch.plan import main; sys.exit(main(['device=h101']) * ('torch' not in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2
