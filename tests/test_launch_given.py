"""A file of one's own, a run to go on with, and a folder of choices, as one list of overrides."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rowwise.launch import start, train
from rowwise.launch.compose import compose_tree
from rowwise.launch.given import gather
from rowwise.launch.job import Job
from rowwise.launch.overrides import as_typed, quoted
from rowwise.launch.settings_file import read_settings
from rowwise.launch.sweep.config import resolve
from rowwise.trainer.config import config_from_tree, tree_of


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def taken(*words: str, of: str = "train") -> dict:
    return compose_tree(gather(words, of))


def refused(*words: str) -> str:
    with pytest.raises(ValueError) as refusal:
        taken(*words)
    said = str(refusal.value)
    assert "\n" not in said
    return said


MINE = """
# what I train
name: mine
optim: lion
optim.lr: 1e-4              # a number, as on the command line
schedule: {name: cosine, warmup: 0.05}
batch:
  global_size: 32
  micro_size: 4
data:
  name: text
  files: [a, "b c", 'it''s']
sample.prompt: 'x = ${not_a_key'
run_dir: out/${name}
"""


def test_a_file_of_overrides_is_what_they_are_on_the_command_line(here):
    write("my.yaml", MINE.replace("sample.prompt: 'x = ${not_a_key'\n", ""))
    words = ["name=mine", "optim=lion", "optim.lr=1e-4", "schedule=cosine", "schedule.warmup=0.05", "batch.global_size=32",
             "batch.micro_size=4", "data=text", "data.files=[a,'b c',\"it's\"]", "run_dir=out/${name}"]  # fmt: skip
    assert taken("config=my.yaml") == taken(*words)
    assert taken("config=my.yaml")["run_dir"] == "out/mine" and taken("config=my.yaml", "name=b")["run_dir"] == "out/b"


def test_the_file_that_the_documents_show_is_taken(here):
    page = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    write("my.yaml", page.partition("```yaml\n")[2].partition("```")[0])
    tree = taken("config=my.yaml")
    assert (tree["optim"]["name"], tree["optim"]["lr"], tree["schedule"]["warmup"]) == ("adamw8bit", 3e-4, 0.05)
    assert (tree["run_dir"], tree["data"]["files"]) == ("out/first", ["corpus/"])


def test_what_stands_behind_wins(here):
    write("a.yaml", "steps: 10\nseed: 1\nbatch: {seq_len: 64}\n")
    write("b.yaml", "steps: 20\nbatch.micro_size: 2\n")
    for words in (["config=a.yaml", "config=b.yaml"], ["config=[a.yaml,b.yaml]"], ["config=a.yaml,b.yaml"]):
        tree = taken(*words)
        assert (tree["steps"], tree["seed"], tree["batch"]["seq_len"], tree["batch"]["micro_size"]) == (20, 1, 64, 2)
    assert taken("config=b.yaml", "config=a.yaml")["steps"] == 10
    assert taken("config=a.yaml", "steps=30")["steps"] == 30
    assert taken("steps=30", "config=a.yaml")["steps"] == 10


def test_another_choice_behind_a_file_leaves_its_keys_of_that_group_out(here):
    write("a.yaml", "optim: {name: lion, kappa: l2, lr: 1e-4}\nsteps: 3\n")
    tree = taken("config=a.yaml", "optim=adafactor")
    assert tree == taken("optim=adafactor", "steps=3")
    assert taken("config=a.yaml", "optim=lion")["optim"]["kappa"] == "l2"
    write("b.yaml", "optim: lion\n")
    assert taken("config=a.yaml", "config=b.yaml")["optim"]["kappa"] == "l2"
    write("c.yaml", "optim: adamw\noptim.eps: 1e-6\n")
    assert taken("config=a.yaml", "config=c.yaml") == taken("steps=3", "optim.eps=1e-6")


def test_files_of_other_frameworks_are_answered_key_by_key(here):
    write("ds.json", '{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", '
          '"params": {"lr": 1e-3}}, "bf16": {"enabled": true}}')  # fmt: skip
    said = refused("config=ds.json")
    for answer in ("batch.micro_size=4", "parallel.zero=2", "optim=adamw", "optim.lr=0.001", "precision=bf16"):
        assert f"write {answer}" in said


def whole(folder: str, *words: str) -> dict:
    """What a run of 4 ranks writes into its folder: the degrees and the rate are filled in."""
    config = config_from_tree(compose_tree([*words, "parallel.shard=4", "nproc=4"]))
    write(f"{folder}/config.yaml", OmegaConf.to_yaml(OmegaConf.create(tree_of(config))))
    return tree_of(config)


RUN = ["name=a", "model.layers=2", "optim=lion", "optim.kappa=l2", "steps=20", "sample.prompt='it\\'s'", "schedule=wsd",
       "optim.assign=[{match: embed.*, rule: adamw}]", "model.rope_scaling={factor: 4.0}"]  # fmt: skip


def test_a_runs_configuration_is_a_file_too(here):
    tree = whole("runs/a", *RUN)
    again = taken("config=runs/a/config.yaml")
    assert tree_of(config_from_tree(again)) == tree | {"parallel": tree["parallel"] | {"shard": -1}}
    other = taken("config=runs/a/config.yaml", "name=b", "steps=5", "optim=adamw")
    assert (other["run_dir"], other["steps"], other["optim"]["name"]) == ("runs/b", 5, "adamw")


def test_resume_alone_goes_on_with_what_the_run_was_started_with(here):
    tree = whole("runs/a", *RUN)
    again = config_from_tree(taken("resume=runs/a"))
    assert tree_of(again) == tree | {"parallel": tree["parallel"] | {"shard": -1}}
    changed = taken("resume=runs/a", "steps=400", "nproc=2")
    assert changed == taken("resume=runs/a") | {"steps": 400, "nproc": 2}
    assert taken("steps=400", "nproc=2", "resume=runs/a") == changed
    assert (again.resume, again.run_dir, again.name) == ("auto", "runs/a", "a")


def test_a_run_whose_length_was_asked_in_tokens_goes_on_so_and_can_be_given_steps(here):
    whole("runs/a", "name=a", "tokens=1e6", "batch.global_tokens=8192")
    again = taken("resume=runs/a")
    assert (again["tokens"], again["steps"], again["batch"]["global_size"]) == (1_000_000, 122, 32)
    longer = taken("resume=runs/a", "steps=400", "batch.global_size=64")
    assert (longer["tokens"], longer["steps"], longer["batch"]["global_size"]) == (None, 400, 64)
    whole("runs/b", "name=b", "steps=9")
    assert (taken("resume=runs/b", "tokens=1e6")["steps"], taken("resume=runs/b")["steps"]) == (244, 9)


def test_a_run_that_was_moved_goes_on_where_it_is(here):
    whole("runs/a", *RUN)
    Path("runs/a").rename("kept")
    assert taken("resume=kept")["run_dir"] == "kept"
    assert taken("resume=kept")["name"] == "a"


def test_resume_beside_a_name_or_of_a_checkpoint_is_what_it_was(here):
    whole("runs/a", *RUN)
    Path("runs/a/checkpoints/step-00000010").mkdir(parents=True)
    for words in (["name=b", "resume=runs/a"], ["resume=runs/a", "run_dir=b"], ["resume=runs/a", "experiment=quick"],
                  ["resume=runs/a/checkpoints/step-00000010"], ["resume=runs/none"], ["resume=auto"], ["resume=never"],
                  ["model=llama_60m", "resume=runs/a"]):  # fmt: skip
        assert gather(words) == words


def test_a_run_that_began_from_another_remembers_it(here):
    whole("runs/a", *RUN, "resume=runs/before")
    assert taken("resume=runs/a")["resume"] == "runs/before"
    whole("runs/c", *RUN, "name=c", "resume=never")
    assert taken("resume=runs/c")["resume"] == "auto"


def test_what_somebody_else_decides_is_not_taken_from_a_run(here):
    whole("runs/a", *RUN)
    assert taken("resume=runs/a", of="worker")["nproc"] is None
    swept = gather(["config=runs/a/config.yaml", "seed=1,2"], "sweep")
    assert not [word for word in swept if word.startswith(("name=", "run_dir=", "resume="))]
    assert "seed=1,2" in swept and "model.layers=2" in swept


def test_the_command_that_is_kept_of_a_run_is_what_was_typed(here):
    words = ("name=a b", "steps=3")
    job = Job(words, Path("runs/a"), 3, nproc=1)
    assert train.command_of(train.parse(job.arguments)) == "rowwise train 'name=a b' steps=3"
    job = replace(job, command="rowwise train config=my.yaml steps=3")
    options = train.parse(job.arguments)
    assert (train.command_of(options), options.overrides) == (job.command, list(words))


def test_a_sweep_reads_files(here, capsys):
    write("my.yaml", "name: mine\nrun_dir: out\nsteps: 4\nmodel: {layers: 2}\nsweep: {name: first}\n")
    config, space = resolve(gather(["config=my.yaml", "optim.lr=1e-3,3e-3"], "sweep"))
    assert config.name == "first" and {"steps=4", "model.layers=2"} <= set(space.fixed)
    said = "config=my.yaml: its name and run_dir are left out; a sweep gives every trial its own\n"
    assert capsys.readouterr().err == said


def test_a_sweep_takes_from_a_file_what_its_trials_begin_from(here, capsys):
    """Not in silence from nothing. Of a run's own file that is what the run began from, as its name is the run's."""
    for resume, kept in (("runs/a", ["resume='runs/a'"]), ("auto", []), ("never", ["resume='never'"])):
        write("my.yaml", f"resume: {resume}\n")
        assert gather(["config=my.yaml", "seed=1,2"], "sweep") == [*kept, "seed=1,2"]
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^resume=never: a sweep goes on"):
        resolve(gather(["config=my.yaml", "seed=1,2"], "sweep"))
    write("my.yaml", "resume: nowhere\n")
    with pytest.raises(ValueError, match="resume=nowhere"):
        resolve(gather(["config=my.yaml", "seed=1,2"], "sweep"))
    whole("runs/b", *RUN, "resume=runs/before")
    assert not [w for w in gather(["config=runs/b/config.yaml", "seed=1,2"], "sweep") if w.startswith("resume=")]
    assert not capsys.readouterr().err


WRONG = {
    "unknown key": ("foo: 1\n", "unknown key foo"),
    "tag": ("name: !!python/object/apply:os.system [touch ran]\n", "line 1: a tag of YAML is not read"),
    "anchor": ("name: &a x\nrun_dir: *a\n", "line 1: an anchor of YAML is not read"),
    "resolver": ("name: ${oc.env:HOME}\n", "a file looks nothing up but keys of the configuration"),
    "nested resolver": ("name: ${oc.env:${seed}}\n", "a file looks nothing up"),
    "target": ("optim: {_target_: os.system, command: touch ran}\n", "optim names code by _target_"),
    "deep target": ("model: {rope_scaling: {_target_: os.system}}\n", "names code by _target_"),
    "hydra": ("hydra: {launcher: {_target_: os.system}}\n", "hydra"),
    "a list": ("- 1\n", "KEY: VALUE"),
    "text": ("steps\n", "KEY: VALUE"),
    "twice": ("steps: 1\nsteps: 2\n", "line 2"),
    "no yaml": ("steps: [1\n", "is no YAML: line 2"),
    "defaults": ("defaults: [{optim: lion}]\n", "write `optim: adamw8bit`"),
    "binary": ("name: !!binary aGk=\n", "a tag of YAML"),
    "a file in it": ("config: b.yaml\n", "'config' is no key"),
    "choice": ("optim: adam\n", "did you mean adamw?"),
    "a lost key": ("name: ${nme}\n", "what stands in ${...} is not there"),
    "a bracket": ("name: ${\n", "config=my.yaml is no YAML of KEY: VALUE"),
    "control characters": ('name: "a\\x1b[2J"\n', "control character"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_file_is_one_line_and_nothing_of_it_runs(case, here):
    text, said = WRONG[case]
    write("my.yaml", text)
    assert said in refused("config=my.yaml")
    assert not Path("ran").exists()


def test_files_that_cannot_be_read_are_named(here):
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    write("large.yaml", "#" * 1_000_001)
    assert "No such file or directory" in refused("config=none.yaml")
    assert "no text in UTF-8" in refused("config=bytes.yaml")
    assert "more than 1,000,000 bytes" in refused("config=large.yaml")
    assert "is a folder" in refused("config=.")
    assert "give the path of a YAML file" in refused("config=")
    assert "give the path of a YAML file" in refused("config=3")


def test_an_experiment_beside_a_whole_configuration_would_change_nothing(here):
    whole("runs/a", *RUN)
    assert "would change nothing" in refused("config=runs/a/config.yaml", "experiment=quick")


def test_an_empty_file_says_nothing(here):
    write("my.yaml", "# nothing\n")
    assert taken("config=my.yaml") == taken()


@pytest.mark.parametrize(
    "value",
    ["a", "", "it's", '"', "a\\", "${name}", "a,b", "[x", "~", "#", "null", "1e-3", "ä", " a ", "\\'", "{", "=", "$"],
)
def test_text_of_a_file_is_that_text(value, here):
    tree = compose_tree([f"sample.prompt={quoted(value)}"])
    assert tree["sample"]["prompt"] == value


# A folder of one's own.


def with_folder(*words: str) -> dict:
    return compose_tree(gather(start.parse([*words, "--config-dir", "mine"]).overrides))


def test_a_folder_brings_more_choices(here):
    write("mine/optim/slow.yaml", "defaults: [lion]\nlr: 1e-5\n")
    write("mine/model/small.yaml", "defaults: [tiny]\nname: small\nlayers: 1\n")
    write("mine/experiment/first.yaml", "# @package _global_\ndefaults: [{override /schedule: cosine}]\nsteps: 7\n")
    tree = with_folder("optim=slow", "model=small", "experiment=first", "optim.kappa=l2")
    assert (tree["optim"]["name"], tree["optim"]["lr"], tree["optim"]["kappa"]) == ("lion", 1e-5, "l2")
    assert (tree["model"]["layers"], tree["name"], tree["steps"], tree["schedule"]["name"]) == (1, "small", 7, "cosine")
    config_from_tree(tree)
    with pytest.raises(ValueError, match=r"possible are .*lion8bit, muon, slow; did you mean slow"):
        with_folder("optim=slw")
    with pytest.raises(ValueError, match="optim=slow: possible are"):
        compose_tree(["optim=slow"])


FOLDERS = {
    "no folder": ({}, "there is no such folder"),
    "another group": ({"hydra/launcher/x.yaml": "_target_: os.system\n"}, "hydra is no group"),
    "a file": ({"train.yaml": "steps: 1\n"}, "train.yaml is no group"),
    "one of ours": ({"optim/adamw.yaml": "lr: 1\n"}, "optim=adamw is one of ours"),
    "code": ({"optim/x.yaml": "name: adamw\nf: {_target_: os.system}\n"}, "none is run from there"),
    "Hydra's own": (
        {"experiment/x.yaml": "# @package _global_\nhydra: {launcher: {_target_: os.system}}\n"},
        "Hydra's own",
    ),
    "Hydra's package": ({"experiment/x.yaml": "# @package hydra.launcher\na: 1\n"}, "Hydra's own"),
    "Hydra's groups": ({"experiment/x.yaml": "defaults: [{override /hydra/launcher: joblib}]\n"}, "Hydra's own"),
    "a tag": ({"optim/x.yaml": "a: !!python/object/apply:os.system [touch ran]\n"}, "holds a tag or an anchor"),
    "a resolver": ({"optim/x.yaml": "defaults: [adamw]\nlr: ${oc.env:LR}\n"}, "looks nothing up"),
    "an anchor": ({"optim/x.yaml": "a: &a [1]\nb: *a\n"}, "holds a tag or an anchor"),
    "a module": ({"optim/x.py": "open('ran', 'w')\n"}, "is no .yaml file"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_wrong_in_a_folder_is_one_line_and_nothing_of_it_runs(case, here):
    files, said = FOLDERS[case]
    for path, text in files.items():
        write(f"mine/{path}", text)
    with pytest.raises(ValueError, match=said) as refusal:
        with_folder("optim=adamw" if case != "code" else "optim=x")
    assert "\n" not in str(refusal.value) and not Path("ran").exists()


def test_a_folder_is_said_as_it_was_typed(here):
    words = start.parse(["optim=slow", "--config-dir", "mine"]).overrides
    assert as_typed(words) == ["optim=slow", "--config-dir", f"{here}/mine"]


def test_a_sweep_takes_choices_of_a_folder(here):
    write("mine/optim/slow.yaml", "defaults: [lion]\nlr: 1e-5\n")
    words = start.parse(["optim=slow,adamw", "steps=2", "--config-dir", "mine"]).overrides
    _, space = resolve(gather(words, "sweep"))
    assert [
        compose_tree([*space.fixed, f"optim={name}"])["optim"]["name"] for name in space.varied["optim"].values
    ] == ["lion", "adamw"]


def test_reading_is_of_plain_data(here):
    write("my.yaml", "a: 1e-3\nb: {c: [yes, 1_000, null]}\n")
    assert read_settings(Path("my.yaml"), "my.yaml") == {"a": 1e-3, "b": {"c": [True, 1000, None]}}
