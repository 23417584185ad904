"""Runs of models of one's own, by file and by package: how their keys are given, and what is said of code that has changed."""

import sys
from pathlib import Path

import pytest
from cases import write_chat
from hydra import compose, initialize_config_module

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.launch.evaluate import main as evaluate
from rowwise.launch.generate import main as generate
from rowwise.launch.given import gather
from rowwise.launch.sweep.config import resolve
from rowwise.launch.sweep.multirun import as_hydra_takes
from rowwise.trainer.manifest import find_checkpoints, read_manifest
from rowwise.trainer.models.code import print_of_code
from runs import records, run_said

EXAMPLE = Path(__file__).parents[1] / "examples" / "gated_conv.py"
CONV = f"model={EXAMPLE}:GatedConv"
SETTINGS = {
    "one by one": (["model.settings.taps=4", "model.settings.share=0.5"], {"taps": 4, "share": 0.5}),
    "beside a table": (["model.settings={taps: 3, share: 1}", "model.settings.taps=5"], {"taps": 5, "share": 1}),
    "before one": (["model.settings.taps=5", "model.settings={share: 1}"], {"taps": 5, "share": 1}),
    "none after all": (["model.settings.taps=5", "model.settings=null"], None),
    "of other keys": (["model.settings.taps=${model.layers}", "model.layers=3"], {"taps": 3}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_keys_of_the_code_are_given_one_by_one(case):
    words, settings = SETTINGS[case]
    assert compose_tree([CONV, *words])["model"]["settings"] == settings


def test_a_file_gives_them_too(tmp_path):
    (file := tmp_path / "mine.yaml").write_text("model.settings.taps: 3\nmodel.settings.share: 2\n")
    tree = compose_tree(gather([CONV, f"config={file}", "model.settings.taps=9"]))
    assert tree["model"]["settings"] == {"taps": 9, "share": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.settings.taps.left=1"], "unknown key model.settings.taps.left"),
        (["model.settings.taps=1,2"], "rowwise sweep model.settings.taps=1,2"),
        (["model.settings.taps=4", "optim.lrr=1"], "unknown key optim.lrr: .*did you mean optim.lr"),
    ],
)
def test_what_no_key_can_be_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        compose_tree([CONV, *words])


def test_a_sweep_varies_them():
    """Each trial alone, and as Hydra composes what its launchers are given."""
    words = gather([CONV, "model.settings={taps: 5}", "model.settings.taps=2,3"], "sweep")
    _, space = resolve(words)
    trials = [[*space.fixed, *(f"{key}={value}" for key, value in trial.items())] for trial in space.grid()]
    assert [compose_tree(trial)["model"]["settings"]["taps"] for trial in trials] == [2, 3]
    with initialize_config_module("rowwise.conf", version_base="1.3"):
        tree = compose("sweep", overrides=as_hydra_takes(trials[1]))
    assert tree.model.settings == {"taps": 3}


def run_with(workers, folder: str, config) -> str:
    """One rank of a run that finds packages in `folder`; what it said."""
    sys.path.insert(0, folder)
    try:
        return run_said(workers, config)
    finally:
        sys.path.remove(folder)


def test_a_run_of_a_package_goes_on_with_a_file_and_says_what_has_changed(ranks, tmp_path, monkeypatch, capfd):
    """The package is that of the file. A copy of it elsewhere is the same code, and another line in it is told of, also where the
    run's model writes or is measured."""
    (package := tmp_path / "packages/mixers_of_ours").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "conv.py").write_text(EXAMPLE.read_text())
    write_chat(tmp_path)
    (changed := tmp_path / "changed.py").write_text(EXAMPLE.read_text() + "\n# another\n")
    monkeypatch.syspath_prepend(package.parent)

    def said(name: str, own: str, steps: int) -> str:
        words = (
            f"run_dir={tmp_path}/{name}",
            f"model.own={own}",
            "model.heads=4",
            "model.kv_heads=2",
            "model.settings.taps=3",
        )
        config = small_config(tmp_path, *words, "batch.global_size=4", "batch.micro_size=2", f"steps={steps}")
        return ranks.run(run_with, 1, str(package.parent), with_layout(config, 1))[0]

    of_package = "mixers_of_ours.conv:GatedConv"
    said("package", of_package, 2)
    said("file", f"{EXAMPLE}:GatedConv", 2)
    assert records(tmp_path / "package") == records(tmp_path / "file") != []
    manifest = read_manifest(find_checkpoints(tmp_path / "package")[0])
    assert manifest["fingerprint"]["code"] == print_of_code(of_package) == print_of_code(f"{EXAMPLE}:GatedConv")
    assert "has changed since" not in said("package", f"{EXAMPLE}:GatedConv", 3)
    told = f"warning: the code of model.own={changed}:GatedConv has changed since step 3 was saved"
    run = f"run={tmp_path / 'package'}"
    for own, times in ((f"{EXAMPLE}:GatedConv", 0), (f"{changed}:GatedConv", 1)):
        assert (
            generate(
                [run, f"model={own}", "prompt=a", f"tokenizer={tmp_path}/tokenizer/tokenizer.json", "max_tokens=1"]
            )
            == 0
        )
        assert capfd.readouterr().err.count(told) == times
        assert evaluate([run, f"model={own}", "data=tokens", f"data.files={tmp_path}/tokens.bin"]) == 0
        assert capfd.readouterr().err.count(told) == times
    assert said("package", f"{changed}:GatedConv", 4).count(told) == 1
