"""Every configuration file is composed and run; every wrong one is refused with a line that helps. (Law 5.)"""

import json
import math
import re
import shutil
from dataclasses import asdict, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from test_trainer_data_chat import write_folder as write_tokenizer

from chat_templates import CHATML
from parity import small_config, write_tokens
from refusals import REFUSED
from rowwise.launch import train as launch
from rowwise.launch import worker
from rowwise.launch.choices import GROUPS
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import OptimConfig
from rowwise.optim.lr_schedules import ScheduleConfig
from rowwise.optim.sparse.config import SparsityConfig
from rowwise.parallel.activations.config import MemoryConfig
from rowwise.parallel.config import DEGREES, ParallelConfig
from rowwise.parallel.precision import PrecisionConfig
from rowwise.trainer.adapters.config import AdapterConfig
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree, tree_of
from rowwise.trainer.data.config import DataConfig
from rowwise.trainer.files import fingerprint
from rowwise.trainer.keys import told_apart
from rowwise.trainer.lock import lock_run
from rowwise.trainer.manifest import CheckpointConfig
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.config_json import their_config
from rowwise.trainer.models.decoder import ModelConfig, parameter_specs
from rowwise.trainer.models.huggingface import write_folder
from rowwise.trainer.prepare import prepare
from rowwise.trainer.tracker import TrackerConfig
from runs import run_said, run_train

CHOICES = {  # group -> choice -> its dataclass
    group: {choice.name: choice for choice in get_args(union)}
    for group, union in {
        "data": DataConfig, "optim": OptimConfig, "schedule": ScheduleConfig, "precision": PrecisionConfig,
        "sparsity": SparsityConfig, "adapter": AdapterConfig, "tracker": TrackerConfig,
    }.items()
}  # fmt: skip
CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.glob("*/*.yaml"))
SHORT = [
    "steps=2",
    "batch.global_size=4",
    "batch.micro_size=2",
    "batch.seq_len=16",
    "eval.batches=1",
    "sample.tokens=2",
]
# A preset of a large model runs with its own options at a small size, and stands for those that are the same model there.
SMALL = [
    "model.layers=1",
    "model.dim=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn_dim=24",
    "model.vocab_size=300",
]


NUMBERS = {
    "name", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab_size", "norm_eps", "rope_theta", "init_std",
}  # fmt: skip


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{file}.yaml").read_text())


def small_size(file: str) -> list[str]:
    """What a preset of a model takes beyond SMALL: each kind of its layers, and heads as wide as factors are told for."""
    keys = read(file)
    turned = len((keys["rope_scaling"] or {}).get("long_factors", ())) * 2 / keys["rope_share"]
    wide = [f"model.head_dim={round(turned)}"] if turned else []
    return [f"model.layers={max(len(keys['window_layers']), len(keys['rope_layers']))}", *wide]


def kinds_of_models(files: list[str]) -> list[str]:
    """The first preset of each kind of model."""
    kinds: dict[str, str] = {}
    for file in files:
        kinds.setdefault(repr({key: value for key, value in read(file).items() if key not in NUMBERS}), file)
    return [*kinds.values()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder that every data source can read something of."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"Document {n}: " + "to be or not to be. " * (n + 5))
    rows = "".join(f'{{"text": "row {n} {"and so on " * 20}"}}\n' for n in range(40))
    (folder / "rows.jsonl").write_text(rows)
    write_tokens(folder)
    (folder / "talk.json").write_text(json.dumps([{"prompt": f"{n}?", "completion": "to be"} for n in range(200)]))
    write_tokenizer(folder / "talk", CHATML)
    (folder / "source").mkdir()
    (folder / "source/config.json").write_text(json.dumps(their_config(ModelConfig(), torch.float32, 128, None)))
    (folder / "cycle.csv").write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    (folder / "short.csv").write_text("0F0,0B0\n1F0,1B0\n")
    return folder


def data_overrides(choice: str, folder: Path) -> list[str]:
    files = {"text": folder, "hf": folder, "tokens": folder / "tokens.bin", "chat": folder / "talk.json"}
    found = [f"data.files={files[choice]}", "data.holdout=0.3"] if choice in files else []
    talk = [f"data.tokenizer={folder / 'talk'}"] if choice == "chat" else []
    mixed = f"data.sources=[{{name: text, files: '{folder}', weight: 2, holdout: 0.3}}, {{name: stdlib, weight: 1}}]"
    talk += [mixed] if choice == "mixture" else []
    return [f"data={choice}", *found, *talk, *(["sample.tokens=null"] if choice == "tokens" else [])]


OPTIONAL = ("tracker/mlflow", "tracker/trackio")  # packages: test_trainer_trackers


def runs_of_files() -> list[tuple[str, ...]]:
    """What is chosen by default is one run, and each experiment. Rules and masks are run in pairs; the others leave each other alone,
    and are run together."""
    defaults = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    chosen = {f"{group}/{choice}" for one in defaults if isinstance(one, dict) for group, choice in one.items()}
    others = [file for file in FILES if file not in chosen and file not in OPTIONAL]
    files = {group: [file for file in others if file.startswith(f"{group}/")] for group in GROUPS}
    files["model"] = kinds_of_models(files["model"])
    alone, *pair = (files.pop(group) for group in ("experiment", "optim", "sparsity"))
    together = [*zip_longest(*pair), *zip_longest(*files.values())]
    return [(), *((file,) for file in alone), *(tuple(filter(None, some)) for some in together)]


@pytest.mark.parametrize("together", runs_of_files(), ids=lambda files: " ".join(files) or "by default")
def test_every_config_file_is_composed_and_run(ranks, tmp_path, text, together):
    overrides = [*(file.replace("/", "=") for file in together), *SMALL, *SHORT, f"run_dir={tmp_path}/run"]
    for file in together:
        group, choice = file.split("/")
        if group == "model":
            overrides += small_size(file)
        if group == "optim" and "rank" in read(file):
            overrides.append("optim.rank=4")
        if file in ("sparsity/set", "sparsity/rigl", "sparsity/srigl"):
            overrides += ["sparsity.update_every=1", "sparsity.stop_at=2"]
        if group == "data":
            overrides += data_overrides(choice, text)
        if file == "adapter/lq_lora":
            overrides.append("adapter.bits=6")  # of short rows, which have many scales
        if file == "tracker/wandb":
            overrides.append("tracker.mode=offline")
    config = config_from_tree(compose_tree(overrides))
    world = math.prod(getattr(config.parallel, axis) for axis in DEGREES if axis != "shard")
    ranks.run(run_train, world, prepare(config, world))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("file", FILES)
def test_every_config_file_holds_all_keys_of_its_dataclass(file):
    group, _choice = file.split("/")
    if group == "experiment":
        assert (CONF / f"{file}.yaml").read_text().startswith("# @package _global_")
        return
    classes = {
        "model": ModelConfig, "parallel": ParallelConfig, "checkpoint": CheckpointConfig, "memory": MemoryConfig,
        **{f"{name}/{key}": value for name, table in CHOICES.items() for key, value in table.items()},
    }  # fmt: skip
    expected = classes.get(group) or classes[file]
    assert read(file).keys() == {f.name for f in fields(expected)}


ONCE = {
    "values": ["steps=7", "name='a b'", "optim.betas=[0.8,0.9]", "model.rope_scaling={factor:4.0}", "optim.lr=1e-3"],
    "choices and values": ["optim=dct", "optim.rank=4", "schedule=wsd", "run_dir=there/${name}"],
    "an experiment": ["experiment=long_context", "batch.seq_len=64"],
    "signs of Hydra's": ["experiment=quick", "++steps=7"],
}


@pytest.mark.parametrize("case", ONCE)
def test_values_beside_choices_that_were_composed_before_are_hydras(case):
    """Twice, since the first leaves nothing in what it was copied from."""
    with initialize_config_module("rowwise.conf", version_base="1.3"):
        theirs = OmegaConf.to_container(compose("train", overrides=ONCE[case]), resolve=True)
    assert [compose_tree(ONCE[case]), compose_tree(ONCE[case])] == [theirs, theirs]


def test_every_group_has_a_folder_and_every_choice_a_file():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders - {"__pycache__", "hydra"} == set(GROUPS)
    for group, table in CHOICES.items():
        assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(table)


def test_a_configuration_survives_the_way_to_the_other_ranks():
    config = config_from_tree(compose_tree(["schedule=wsd", "precision=fp16", "data=text", "data.files=[a,b]"]))
    assert config_from_tree(tree_of(config)) == config
    assert isinstance(config, TrainConfig)
    assert asdict(config)["data"]["files"] == ["a", "b"]


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(text, tmp_path, what, capsys, monkeypatch):
    """As a user meets them: one line, exit code 2, and nothing left on disk."""
    monkeypatch.chdir(tmp_path)
    overrides, message = REFUSED[what]
    overrides = [override.replace("{folder}", str(text)) for override in overrides]
    told: list = []  # what the other worker hears through the store
    monkeypatch.setattr(worker, "workers_from_environment", lambda: worker.Workers(rank=0, world_size=2))
    monkeypatch.setattr(worker, "announce_end", lambda workers, end: told.append(str(end)))
    assert launch.main(overrides) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said), said
    assert said.startswith("refused: ")
    assert "\n" not in said
    assert [reason.strip() for reason in told] == [said.removeprefix("refused: ")]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_or_other_data_is_refused(ranks, tmp_path):
    base = ["steps=2", "checkpoint.every=1"]
    ranks.run(run_train, 1, check(small_config(tmp_path, *base), 1))
    cases = {
        ("model.layers=3",): r"is of another model: model.layers=2 there and 3 here; give the same, or another name",
        ("optim=lion",): r"holds other optimizer states: optim.name=adamw there and lion here",
        ("optim.assign=[{match: embed.*, rule: lion}]",): r"holds other optimizer states: optim.assign=\[\] there",
        ("optim.param_dtype=bf16", "precision=bf16"): r"keeps its parameters otherwise: optim.param_dtype=None there",
        ("seed=5",): r"read other data: seed=0 there and 5 here; to go on with it on purpose, give another name",
        ("batch.seq_len=12",): r"batch.seq_len=13 there and 12 here",
        ("resume=never",): r"resume=never, but run_dir=.* already holds a run",
    }
    for overrides, message in cases.items():
        with pytest.raises(ValueError, match=message):
            prepare(small_config(tmp_path, *base, *overrides), 1)
    with pytest.raises(ValueError, match="this run has a later checkpoint, step-00000002, which would be lost"):
        prepare(small_config(tmp_path, *base, f"resume={tmp_path}/run/checkpoints/step-00000001"), 1)
    onwards = small_config(tmp_path, "steps=4", "seed=5", f"resume={tmp_path}/run", f"run_dir={tmp_path}/next")
    assert ranks.run(run_train, 1, prepare(onwards, 1))[0].step == 4
    assert [record["step"] for record in read_metrics(tmp_path / "next")] == [3, 4]
    # Started again with the same words, as torchrun does after a failure, it goes on with its own checkpoints.
    again = replace(onwards, steps=6)
    assert ranks.run(run_train, 1, prepare(again, 1))[0].step == 6
    assert [record["step"] for record in read_metrics(tmp_path / "next")] == [3, 4, 5, 6]


APART = [
    (1, 2, "1", "2"),
    ("0123456789abcdef" * 4, "f123456789abcdef" * 4, "0123456789ab...", "f123456789ab..."),
    ([{"match": "blocks.*", "rule": "frozen"}], [{"match": "blocks.0.*", "rule": "frozen"}],
     "[{'match': 'blocks.*', 'rule': ...", "[{'match': 'blocks.0.*', 'rule'..."),
    ([*range(90)], [*range(90), 7], "..., 84, 85, 86, 87, 88, 89]", "..., 84, 85, 86, 87, 88, 89, 7]"),
    ({"a": 1, **dict.fromkeys("bcdefghij", 2)}, {"k": 3, **dict.fromkeys("bcdefghij", 2)}, "{'a': 1}", "{'k': 3}"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "first", "second"), APART)
def test_two_values_that_differ_are_told_apart(one, other, first, second):
    assert told_apart(one, other) == (first, second)
    assert told_apart(other, one) == (second, first)


def test_a_path_to_resume_from_is_never_passed_over_in_silence(ranks, tmp_path):
    """Where the run folder has a checkpoint of its own that did not begin there: refused, whatever the path names. The
    same command again goes on with its own, and says so, also where what it began from is gone."""

    def run_of(name: str, *overrides: str) -> TrainConfig:
        return small_config(tmp_path, "steps=1", f"run_dir={tmp_path}/{name}", *overrides)

    for name, overrides in {"base": [], "own": [], "other": ["model.layers=1"]}.items():
        ranks.run(run_train, 1, check(run_of(name, *overrides), 1))
    (checkpoint,) = (tmp_path / "base/checkpoints").glob("step-*")
    for path in (tmp_path / "base", checkpoint, tmp_path / "other"):
        with pytest.raises(ValueError) as refusal:
            prepare(run_of("own", "steps=2", f"resume={path}"), 1)
        assert str(refusal.value) == (
            f"resume={path}, but run_dir={tmp_path}/own already holds a run that did not begin there, with its own "
            f"step-00000001; give resume=auto to go on with that, or another name to begin from resume={path}"
        )
    own = f"resume={tmp_path}/own/checkpoints/step-00000001"
    for path in (f"resume={tmp_path}/own", own, "resume=auto"):
        assert prepare(run_of("own", "steps=2", path), 1).steps == 2

    branch = run_of("branch", "steps=2", f"resume={tmp_path}/base")
    assert f"resumed from {checkpoint}\n" in ranks.run(run_said, 1, prepare(branch, 1))[0]
    again = replace(branch, steps=3, resume=f"{tmp_path}/branch/../base")
    said = ranks.run(run_said, 1, prepare(again, 1))[0]
    ours = tmp_path / "branch/checkpoints/step-00000002"
    assert f"resumed from {ours}; the run began from resume={again.resume}, and goes on with its own\n" in said
    shutil.rmtree(tmp_path / "base")
    assert prepare(replace(branch, steps=4), 1).steps == 4
    with pytest.raises(ValueError, match=r"resume=.*other, but run_dir=.*branch already holds a run"):
        prepare(replace(branch, resume=f"{tmp_path}/other"), 1)


def test_weights_to_begin_from_are_never_passed_over_in_silence(ranks, tmp_path):
    """A run that goes on from a checkpoint begins from no folder: refused where the checkpoint's own run did not."""
    config = check(small_config(tmp_path, "steps=1"), 1)
    ranks.run(run_train, 1, config)
    _write_source(tmp_path / "source", config.model)
    began = replace(config, model=replace(config.model, init_from=str(tmp_path / "source")))
    for resume, name in (("auto", "run"), (f"{tmp_path}/run", "next")):
        with pytest.raises(
            ValueError, match=r"model.init_from=.*source, but the run goes on .* began from random numb"
        ):
            prepare(replace(began, steps=2, resume=resume, run_dir=f"{tmp_path}/{name}"), 1)
    first = prepare(replace(began, run_dir=f"{tmp_path}/first"), 1)
    ranks.run(run_train, 1, first)
    prepare(replace(first, steps=2), 1)
    prepare(replace(first, steps=2, resume=first.run_dir, run_dir=f"{tmp_path}/second"), 1)
    prepare(replace(first, steps=2, model=config.model), 1)
    _write_source(tmp_path / "another", config.model)
    with pytest.raises(
        ValueError, match=r"model.init_from=.*another, .* began from .*source; leave model.init_from out"
    ):
        prepare(replace(first, model=replace(config.model, init_from=str(tmp_path / "another"))), 1)


def _write_source(folder: Path, model: ModelConfig) -> None:
    """A Hugging Face folder of zeros."""
    folder.mkdir()
    read_ = lambda tensors: [tensor.fill_(0.1) for tensor in tensors.values()]  # noqa: E731
    values = their_config(model, torch.float32, 128, None)
    write_folder(folder, values, parameter_specs(model), read_, torch.float32, 10**9)


def test_a_checkpoint_of_the_first_version_goes_on(ranks, tmp_path):
    """Its manifest knows the rule's name alone."""
    config = check(small_config(tmp_path, "steps=2"), 1)
    ranks.run(run_train, 1, config)
    (path,) = (tmp_path / "run/checkpoints").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["checksum"], manifest["config"]["optim"]["param_dtype"]
    manifest["model"]["optim.name"] = manifest.pop("states")["optim.name"]
    path.write_text(json.dumps({**manifest, "checksum": fingerprint(manifest)}))
    with pytest.raises(ValueError, match=r"other optimizer states: optim.name=adamw there and lion here"):
        prepare(small_config(tmp_path, "steps=4", "optim=lion"), 1)
    ranks.run(run_train, 1, prepare(replace(config, steps=4), 1))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_two_runs_in_one_directory_are_refused(tmp_path):
    with lock_run(tmp_path), pytest.raises(ValueError, match="in use by another run"):
        lock_run(tmp_path)
