"""Every configuration file is composed and run; every wrong one is refused with a line that helps."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from parity import small_config, write_tokens
from rowwise.launch import train as launch
from rowwise.launch.compose import GROUPS, compose_tree
from rowwise.optim.build import OptimConfig
from rowwise.optim.schedules import ScheduleConfig
from rowwise.parallel.mesh import DEGREES, ParallelConfig
from rowwise.parallel.precision import PrecisionConfig
from rowwise.trainer.config import TrainConfig, check, config_from_tree, tree_of
from rowwise.trainer.data.config import DataConfig
from rowwise.trainer.manifest import CheckpointConfig, fingerprint
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import ModelConfig
from rowwise.trainer.prepare import lock_run, prepare
from rowwise.trainer.tracker import TrackerConfig
from runs import run_train

CHOICES = {  # group -> choice -> its dataclass
    group: {choice.name: choice for choice in get_args(union)}
    for group, union in {
        "data": DataConfig, "optim": OptimConfig, "schedule": ScheduleConfig, "precision": PrecisionConfig,
        "tracker": TrackerConfig,
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
# A preset of a large model runs with its own options at a small size.
SMALL = [
    "model.layers=1",
    "model.dim=32",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn_dim=24",
    "model.vocab_size=300",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder that every data source can read something of."""
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"Document {n}: " + "to be or not to be. " * (n + 5))
    rows = "".join(f'{{"text": "row {n} {"and so on " * 20}"}}\n' for n in range(40))
    (folder / "rows.jsonl").write_text(rows)
    write_tokens(folder)
    (folder / "cycle.csv").write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    (folder / "short.csv").write_text("0F0,0B0\n1F0,1B0\n")
    return folder


def data_overrides(choice: str, folder: Path) -> list[str]:
    files = {"text": folder, "hf": folder, "tokens": folder / "tokens.bin"}
    found = [f"data.files={files[choice]}", "data.holdout=0.3"] if choice in files else []
    return [f"data={choice}", *found, *(["sample.tokens=0"] if choice == "tokens" else [])]


@pytest.mark.parametrize("file", FILES)
def test_every_config_file_is_composed_and_run(ranks, tmp_path, text, file):
    group, choice = file.split("/")
    overrides = [f"{group}={choice}", *SMALL, *SHORT, f"run_dir={tmp_path}/run"]
    if "rank" in yaml.safe_load((CONF / f"{file}.yaml").read_text()):
        overrides.append("optim.rank=4")
    if group == "data":
        overrides += data_overrides(choice, text)
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
        "model": ModelConfig, "parallel": ParallelConfig, "checkpoint": CheckpointConfig,
        **{f"{name}/{key}": value for name, table in CHOICES.items() for key, value in table.items()},
    }  # fmt: skip
    expected = classes.get(group) or classes[file]
    assert yaml.safe_load((CONF / f"{file}.yaml").read_text()).keys() == {f.name for f in fields(expected)}


def test_every_group_has_a_folder_and_every_choice_a_file():
    assert {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(GROUPS)
    for group, table in CHOICES.items():
        assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(table)


def test_a_configuration_survives_the_way_to_the_other_ranks():
    config = config_from_tree(compose_tree(["schedule=wsd", "precision=fp16", "data=text", "data.files=[a,b]"]))
    assert config_from_tree(tree_of(config)) == config
    assert isinstance(config, TrainConfig)
    assert asdict(config)["data"]["files"] == ["a", "b"]


TWO = ["parallel.pipeline=2"]
REFUSED = {
    "unknown key": (["optim.learning_rate=1"], r"unknown key optim.learning_rate: optim has assign, betas, eps, .*name, "),
    "misspelt key": (["batch.micro_sise=1"], r"unknown key batch.micro_sise: .*did you mean batch.micro_size\?"),
    "added key": (["+model.depth=3"], r"unknown key model.depth: model has .*layers"),
    "key of another choice": (["data=text", "data.separator=0"], r"unknown key data.separator: data has .*tokenizer"),
    "wrong type": (["batch.seq_len=long"], r"batch.seq_len='long': input should be a valid integer"),
    "fraction for a whole number": (["steps=2.5"], r"steps=2.5: .*valid integer"),
    "wrong type in a choice": (["schedule=wsd", "schedule.warmup_steps=a"], r"schedule.warmup_steps='a': .*integer"),
    "unknown choice": (["optim=sgd"], r"optim/sgd.*Available options.*adamw"),
    "unknown name": (["precision.name=fp8"], r"precision.name='fp8': possible are 'fp64', 'fp32', 'bf16', 'fp16'"),
    "not an override": (["steps"], r"steps"),
    "below a number": (["optim.lr.x=3"], r"unknown key optim.lr.x"),
    "no number": (["clip_norm=nan"], r"clip_norm=nan: give a finite number"),
    "no name": (["name=.."], r"name='..': a run name is the name of a folder"),
    "endless loss scale": (["precision=fp16", "precision.initial_scale=1e999"], r"finite"),
    "rope": (["model.rope_theta=0"], r"model.rope_theta and model.init_std are above 0"),
    "no steps": (["steps=0"], r"steps=0: a run has at least 1 step"),
    "heads": (["model.heads=3"], r"model.dim=256 is not divisible by model.heads=3; give a multiple of 3, or model.head_dim"),
    "key/value heads": (["model.kv_heads=3"], r"model.kv_heads=3; possible for kv_heads are \[1, 2, 4\]"),
    "odd head dim": (["model.head_dim=31"], r"head dim is 31: .*must be even"),
    "batch": (["batch.global_size=20"], r"batch.global_size=20 does not divide into 2 .*batch.micro_size=8; .*\[16, 32\]"),
    "degrees": (["parallel.shard=3"], r"replicate=1 x parallel.shard=3 = 3 workers, but the world size is 2"),
    "replicate": (["parallel.replicate=3"], r"parallel.replicate=3 does not divide the world size 2; possible are \[1, 2\]"),
    "pipeline degree": (["parallel.pipeline=3"], r"pipeline=3 x parallel.replicate=1 does not divide the world size 2; possible"),
    "pipeline and shard": (["parallel.pipeline=2", "parallel.shard=2"], r"= 4 workers, but the world size is 2; start 4 workers"),
    "stages without layers": (
        [*TWO, "parallel.virtual_stages=3", "parallel.pipeline_schedule=gpipe"],
        r"6 pipeline stages .*model.layers=4: a stage has at least one layer; give at most 4 stages",
    ),
    "virtual stages": ([*TWO, "parallel.virtual_stages=2"], r"pipeline_schedule=1f1b with parallel.virtual_stages=2: possible is 1"),
    "too few virtual stages": ([*TWO, "parallel.pipeline_schedule=zb_v"], r"zb_v with parallel.virtual_stages=1: possible is 2;"),
    "micro-batches": (
        [*TWO, "parallel.pipeline_schedule=zb_h2"],
        r"zb_h2 on 2 ranks needs at least 3 micro-batches a step and there are 2; .*or one of gpipe, 1f1b",
    ),
    "one micro-batch": ([*TWO, "batch.global_size=8"], r"1f1b on 2 ranks needs at least 2 micro-batches a step and there are 1"),
    "unit": (
        [*TWO, "parallel.pipeline_schedule=blockwise", "parallel.pipeline_unit=3"],
        r"parallel.pipeline_unit=3: a unit of blockwise has from 2 \(the ranks\) to 2",
    ),
    "unit of another": ([*TWO, "parallel.pipeline_unit=2"], r"pipeline_unit=2 with 1f1b: only blockwise has units"),
    "unknown schedule": ([*TWO, "parallel.pipeline_schedule=2f2b"], r"pipeline_schedule=2f2b: possible are gpipe, .*auto"),
    "missing schedule": ([*TWO, "parallel.pipeline_schedule=no.csv"], r"pipeline_schedule=no.csv: .*No such file"),
    "a schedule with a cycle": (
        [*TWO, "parallel.pipeline_schedule={folder}/cycle.csv"],
        r"wait for each other in a circle: .*cycle.csv, line 1 stops at 0B0, .*cycle.csv, line 2 stops at 1F1",
    ),
    "a schedule of another step": ([*TWO, "parallel.pipeline_schedule={folder}/short.csv"], r"short.csv, line 1: 0F1 is missing"),
    "gathering below stage 3": ([*TWO, "parallel.pipeline_gather=run"], r"gather=run with parallel.zero=1, .*give parallel.zero=3"),
    "tracing beyond the end": ([*TWO, "parallel.pipeline_trace=201"], r"pipeline_trace=201: a step of the 200, counted from 1"),
    "memory of another": ([*TWO, "parallel.pipeline_memory=2"], r"pipeline_memory=2.0 with 1f1b: only auto looks at it"),
    "too little memory": (
        [*TWO, "parallel.pipeline_schedule=auto", "parallel.pipeline_memory=0.1"], r"pipeline_memory=0.1: 1 is what 1f1b holds, 2",
    ),
    "costs": ([*TWO, "parallel.pipeline_schedule=auto", "parallel.pipeline_costs=/no.json"], r"costs=/no.json: .*leave it null"),
    "a schedule without a pipeline": (
        ["parallel.pipeline_schedule=zb_h1"], r"pipeline_schedule=zb_h1 with parallel.pipeline=1: there is no pipeline",
    ),
    "compiled halves": (
        [*TWO, "compile=true", "parallel.pipeline_schedule=zb_h1"], r"compile=true with .*zb_h1: .*or gpipe, 1f1b or interleaved",
    ),
    "stages in the backward": ([*TWO, "optim.in_backward=true", "clip_norm=0"], r"in_backward with parallel.pipeline=2"),
    "a step that cannot be taken back": (
        [*TWO, "parallel.post_validation=true", "optim=muon"], r"post_validation with optim=muon: .*possible are adamw, adamw8bit",
    ),
    "heads that do not divide": (
        ["parallel.ulysses=2", "model.heads=5", "model.kv_heads=5", "model.head_dim=4"],
        r"parallel.ulysses=2 with model.heads=5: .*possible are \[1, 5\], and parallel.ring",
    ),
    "an order without a ring": (["parallel.ring_order=striped"], r"ring_order=striped with parallel.ring=1: there is no ring"),
    "unknown order": (["parallel.ring=2", "parallel.ring_order=random"], r"ring_order='random': input should be 'contiguous', 'zig"),
    "no ranks to share": (["parallel.ring=0"], r"parallel.ring=0: degrees are at least 1"),
    "too many to share": (
        ["parallel.ring=2", "parallel.ulysses=2"], r"replicate=1 x parallel.ring=2 x parallel.ulysses=2 does not divide .* size 2",
    ),
    "ranks that are not there": (
        ["parallel.ring=2", "parallel.shard=2"], r"parallel.ring=2 x parallel.shard=2 = 4 workers, but the world size is 2",
    ),
    "backend": (["parallel.backend=accelerate"], r"parallel.backend='accelerate': input should be 'torch'"),
    "zero": (["parallel.zero=4"], r"parallel.zero=4: possible are 0, 1, 2 and 3"),
    "learning rate": (["optim.lr=0"], r"optim.lr=0.*above 0"),
    "betas": (["optim.betas=[0.9]"], r"optim.betas=\[0.9\]: two numbers"),
    "unknown rule": (["optim=shampoo"], r"optim/shampoo.*Available options.*adafactor"),
    "rank above the narrow side": (
        ["optim=galore", "optim.rank=129"],
        r"optim.rank=129 is above the narrow side of blocks.0.attention.wk.weight, \(128, 256\); give at most 128, or another",
    ),
    "rank": (["optim=fira", "optim.rank=0"], r"optim.rank=0: it is at least 1"),
    "growth": (["optim=fira", "optim.growth=0.5"], r"optim.growth=0.5"),
    "state bits": (["optim=galore", "optim.state_bits=4"], r"optim.state_bits=4: input should be 8 or 32"),
    "momentum": (["optim=muon", "optim.momentum=1"], r"optim.momentum=1"),
    "adafactor": (["optim=adafactor", "optim.clip_threshold=0"], r"clip_threshold is above 0"),
    "an 8-bit rule on a vector": (
        ["optim.assign=[{match: '*norm*', rule: adamw8bit}]"], r"adamw8bit is for matrices, and blocks.0.attention_norm.weight",
    ),
    "a pattern without a parameter": (
        ["optim.assign=[{match: 'layers.*', rule: adamw}]"], r"no parameter matches 'layers.\*'; there are blocks.\*.attention",
    ),
    "a pattern that an earlier one hides": (
        ["optim.assign=[{match: '*', rule: adamw}, {match: 'embed.*', rule: lion}]"],
        r"no parameter matches 'embed.\*' that no earlier pattern takes",
    ),
    "unknown key in a list": (
        ["optim.assign=[{match: '*', rule: adamw, lr: 1e-5}]"], r"unknown key optim.assign\[0\].lr: optim.assign\[0\] has match, rule",
    ),
    "a rule that cannot be assigned": (["optim.assign=[{match: '*', rule: sgd}]"], r"optim.assign.*rule='sgd': input should be"),
    "clipping in the backward": (["optim.in_backward=true"], r"optim.in_backward with clip_norm=1.0: .*give clip_norm=0"),
    "accumulation in the backward": (
        ["optim.in_backward=true", "clip_norm=0", "batch.micro_size=4"],
        r"with 2 micro-batches a step: .*give batch.micro_size=8 or batch.global_size=8",
    ),
    "fp16 in the backward": (["optim.in_backward=true", "clip_norm=0", "precision=fp16"], r"in_backward with precision=fp16"),
    "replicas in the backward": (
        ["optim.in_backward=true", "clip_norm=0", "parallel.zero=0", "precision=bf16"],
        r"in_backward with parallel.replicate=1 parallel.zero=0: .*give parallel.replicate=1 and parallel.zero=1 to 3",
    ),
    "split gradients in bf16": (
        ["optim.param_dtype=bf16", "precision=bf16", "parallel.zero=2", "batch.micro_size=4"],
        r"parallel.zero=2 and 2 micro-batches a step: .*give parallel.zero=1, or batch.micro_size=8",
    ),
    "8-bit moments of rank 1": (["optim=apollo_mini", "+optim.state_bits=8"], r"unknown key optim.state_bits"),
    "bf16 parameters": (["optim.param_dtype=bf16"], r"optim.param_dtype=bf16 with precision=fp32: .*give precision=bf16"),
    "schedule too long": (["schedule=wsd", "schedule.decay_steps=500"], r"take 500 steps and the run has 200"),
    "annealing": (["schedule=infinite", "schedule.anneal_steps=5"], r"without schedule.anneal_at"),
    "held-out share": (["data.holdout=1"], r"data.holdout=1.*share from 0 to below 1"),
    "nothing held out": (["data.holdout=0"], r"eval.every is on and data.holdout=0"),
    "no files": (["data=text"], r"data.files is empty; give a path, a folder or a glob"),
    "missing file": (["data=text", "data.files=/nowhere/*.txt"], r"/nowhere/\*.txt names no file"),
    "missing tokenizer": (["data=text", "data.files={folder}", "data.tokenizer=/no.json"], r"tokenizer=/no.json: no such file"),
    "no tokenizer file": (["data=text", "data.files={folder}", "data.tokenizer={folder}/0.txt"], r"not a tokenizer.json"),
    "vocabulary": (["model.vocab_size=100"], r"go up to 255, but model.vocab_size=100; give model.vocab_size=256 or more"),
    "tokens beyond the vocabulary": (
        ["data=tokens", "data.files={folder}/tokens.bin", "model.vocab_size=50", "sample.tokens=0"],
        r"go up to 60, but model.vocab_size=50",
    ),
    "too little data": (["data=text", "data.files={folder}/0.txt", "batch.seq_len=9999", "data.holdout=0", "eval.every=0"],
                        r"one sample takes batch.seq_len \+ 1 = 10000"),
    "column": (["data=hf", "data.files={folder}/rows.jsonl", "data.column=body"], r"no text in column 'body'; its columns are text"),
    "sampling tokens": (["data=tokens", "data.files={folder}/tokens.bin"], r"has no tokenizer to write with"),
    "empty prompt": (["sample.prompt=''"], r"sample.prompt='' has no token to go on from"),
    "resume": (["resume=/nowhere"], r"resume=/nowhere: no checkpoint there; give auto, never, or the path"),
    "run directory": (["run_dir=/dev/null/run"], r"run_dir=/dev/null/run cannot be written .*give another run_dir"),
    "init_from": (["model.init_from=/nowhere"], r"model.init_from=/nowhere: .*No such file.*give a Hugging Face folder"),
    "keep": (["checkpoint.keep=-1"], r"checkpoint.keep=-1"),
    "clip": (["clip_norm=-1"], r"clip_norm=-1"),
    "name": (["name=a/b"], r"name='a/b'"),
    "tracker": (["tracker=wandb", "tracker.mode=on"], r"tracker.mode=.*'online' or 'offline'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(text, tmp_path, what, capsys, monkeypatch):
    """As a user meets them: one line, exit code 2, and nothing left on disk."""
    monkeypatch.chdir(tmp_path)
    overrides, message = REFUSED[what]
    overrides = [override.replace("{folder}", str(text)) for override in overrides]
    told: list = []  # what the other worker hears through the store
    monkeypatch.setattr(launch, "workers_from_environment", lambda: launch.Workers(rank=0, world_size=2))
    monkeypatch.setattr(launch, "announce", lambda workers, tree: told.append(tree))
    assert launch.main(overrides) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said), said
    assert said.startswith("refused: ")
    assert "\n" not in said
    assert told == [None]
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
