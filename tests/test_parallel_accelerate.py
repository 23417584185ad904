"""What DeepSpeed is told of a run, files of one's own, and the optimizer of flat pieces: all without DeepSpeed."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from parity import small_config, with_layout
from rowwise.launch import builds
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.optim.flat import FlatOptimizer
from rowwise.parallel.accelerate.deepspeed_json import deepspeed_json
from rowwise.parallel.accelerate.files import check_file, settings_of
from rowwise.trainer.accelerate.engine import DeepSpeedEngine
from rowwise.trainer.accelerate.require import check_engine_here
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.models.decoder import Decoder

ON = ("precision=fp32", "parallel.backend=accelerate")


def run_of(folder: Path, *words: str, workers: int = 2):
    return with_layout(small_config(folder, *ON, *words), workers)


def test_deepspeed_is_told_what_the_run_says(tmp_path):
    config = run_of(tmp_path, "parallel.zero=3", "parallel.deepspeed.offload_optimizer=cpu", "clip_norm=0.25")
    told = deepspeed_json(config)
    assert (
        told["train_batch_size"]
        == 24
        == told["train_micro_batch_size_per_gpu"] * told["gradient_accumulation_steps"] * 2
    )
    assert told["gradient_clipping"] == 0.25
    assert told["zero_optimization"]["stage"] == 3
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert told["zero_optimization"]["offload_param"] == {"device": "none"}
    assert not told["bf16"]["enabled"] and not told["fp16"]["enabled"]
    bf16 = deepspeed_json(run_of(tmp_path, "precision=bf16"))
    assert bf16["bf16"]["enabled"] and bf16["communication_data_type"] == "fp32"


def file_of(folder: Path, content: dict, name: str = "own.json") -> str:
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return f"parallel.accelerate_config={path}"


def test_a_file_of_ones_own_adds_what_the_run_does_not_say(tmp_path):
    own = {
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": 1000,
        },
        "gradient_clipping": "auto",
        "train_batch_size": 24,
        "comms_logger": {"enabled": True},
    }
    settings = settings_of(run_of(tmp_path, "parallel.zero=2", file_of(tmp_path, own)))
    assert settings["zero_optimization"]["allgather_bucket_size"] == 1000
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert "reduce_bucket_size" not in settings["zero_optimization"]
    assert settings["comms_logger"] == {"enabled": True}
    assert settings["gradient_clipping"] == 0.5


ACCELERATE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": 2, "mixed_precision": "no",
              "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": "auto"}}  # fmt: skip


def test_what_accelerate_config_wrote_is_read(tmp_path):
    word = file_of(tmp_path, ACCELERATE, "default_config.yaml")
    assert settings_of(run_of(tmp_path, "parallel.zero=2", word))["zero_optimization"]["stage"] == 2


CONTRADICTIONS = {
    "another stage": (
        {"zero_optimization": {"stage": 3}},
        "zero_optimization.stage=3 contradicts the run, which says 2",
    ),
    "another batch": ({"train_batch_size": 32}, "train_batch_size=32 contradicts the run, which says 24"),
    "another precision": (
        {"bf16": {"enabled": True}},
        r"bf16.enabled=True contradicts the run, which says False; .*precision",
    ),
    "another place": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        r"offload_optimizer.device=cpu contradicts .*parallel.deepspeed.offload_optimizer",
    ),
    "an optimizer": ({"optimizer": {"type": "AdamW"}}, "'optimizer' is not read from there; give optim="),
    "a scheduler": ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is not read from there; give schedule="),
    "unknown": ({"elasticity": {"enabled": True}}, "unknown key 'elasticity'; possible are "),
    "what DeepSpeed does not know": (
        {"zero_optimization": {"no_such_key": True}},
        "zero_optimization.no_such_key=True would not be read, or would change what is computed; possible are allgather_",
    ),
    "pieces that it reads in another order": (
        {"zero_optimization": {"round_robin_gradients": True}},
        "zero_optimization.round_robin_gradients=True would not be read, or would change",
    ),
    "no norm": (
        {"zero_optimization": {"compute_grad_norm": False}},
        "zero_optimization.compute_grad_norm=False would not be read, or would change",
    ),
    "a part that stays on the device": (
        {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
        "zero_optimization.offload_optimizer.ratio=0.5 would not be read, or would change",
    ),
    "masters of 16 bits": (
        {"bf16": {"bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads=True would not be read, or would change",
    ),
    "a loss scale": ({"fp16": {"initial_scale_power": 8}}, "fp16.initial_scale_power is not read from there"),
}
OF_ACCELERATE = {
    "another world": ({"num_processes": 8}, "num_processes=8, and the run has 2 workers; start as many"),
    "another engine": ({"distributed_type": "FSDP"}, "distributed_type=FSDP, .*parallel.accelerate=fsdp2"),
    "another precision": ({"mixed_precision": "bf16"}, "mixed_precision=bf16, and the run has precision=fp32"),
    "another stage": ({"deepspeed_config": {"zero_stage": 3}}, "stage=3 contradicts the run, which says 2"),
    "unknown": ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config=.* would not be read"),
    "unknown inside": (
        {"deepspeed_config": {"zero_stag": 3}},
        "deepspeed_config.zero_stag=3 would not be read; possible are",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_a_deepspeed_file_contradicts_is_refused_by_name(tmp_path, what):
    content, message = CONTRADICTIONS[what]
    with pytest.raises(ValueError, match=rf"parallel.accelerate_config=\S+own.json: .*{message}") as refused:
        check_file(run_of(tmp_path, "parallel.zero=2", file_of(tmp_path, content)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", OF_ACCELERATE)
def test_what_an_accelerate_file_contradicts_is_refused_by_name(tmp_path, what):
    changed, message = OF_ACCELERATE[what]
    with pytest.raises(ValueError, match=message) as refused:
        check_file(run_of(tmp_path, "parallel.zero=2", file_of(tmp_path, ACCELERATE | changed, "a.yaml")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["!!python/object/apply:os.system ['touch ran']", "[1, 2]", "{", "\x00"])
def test_a_strangers_file_is_data_and_no_code(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"a.yaml"):
        check_file(run_of(tmp_path, f"parallel.accelerate_config={tmp_path}/a.yaml"))
    assert not (tmp_path / "ran").exists()


def test_an_fsdp_file_is_held_against_the_run(tmp_path):
    inside = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    content = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": inside}
    words = ("parallel.accelerate=fsdp2", "parallel.zero=3")
    check_file(run_of(tmp_path, *words, file_of(tmp_path, content, "f.yaml")))
    content["fsdp_config"] = inside | {"fsdp_version": 1}
    with pytest.raises(ValueError, match=r"fsdp_config.fsdp_version=1 contradicts the run, which has 2"):
        check_file(run_of(tmp_path, *words, file_of(tmp_path, content, "f.yaml")))


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_flat_pieces_change_as_the_parameters_they_are_cut_from(rule):
    """Pieces that begin and end inside rows, three steps, one call a piece, as DeepSpeed makes them. Ends of a piece, which no vector
    of the processor fills, may round otherwise."""
    config = config_from_tree(
        compose_tree([f"optim={rule}", "model=tiny", "model.layers=1", "model.dim=32", "model.vocab_size=50"])
    )
    torch.manual_seed(0)
    models = [Decoder(config.model) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole = build_optimizer(models[0], config.optim)
    flat = FlatOptimizer(build_optimizer(models[1], config.optim), dict(models[1].named_parameters()))
    groups = [list(group["params"]) for group in flat.param_groups]
    pieces = [nn.Parameter(torch.cat([p.detach().flatten() for p in params])) for params in groups]
    halves = [[nn.Parameter(part) for part in piece.detach().split(piece.numel() // 2 + 3)] for piece in pieces]
    for step in range(3):
        gradients = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in models[0].parameters()
        ]
        by_name = dict(zip((name for name, _ in models[0].named_parameters()), gradients, strict=True))
        for name, p in models[0].named_parameters():
            p.grad = by_name[name]
        whole.step()
        flat.begin_step()
        names = {p: name for name, p in models[1].named_parameters()}
        for group, params, parts in zip(flat.param_groups, groups, halves, strict=True):
            gradient = torch.cat([by_name[names[p]].flatten() for p in params])
            for part, piece in zip(gradient.split(gradient.numel() // 2 + 3), parts, strict=True):
                piece.grad, group["params"] = part, [piece]
                flat.step()
                group["params"] = []
    for params, parts in zip(groups, halves, strict=True):
        names = {p: name for name, p in models[1].named_parameters()}
        expected = torch.cat([models[0].get_parameter(names[p]).detach().flatten() for p in params])
        torch.testing.assert_close(torch.cat([part.detach() for part in parts]), expected, rtol=1e-6, atol=1e-8)


class Overflowing:
    """An engine of DeepSpeed's whose every step finds no finite norm, and makes no update."""

    def __init__(self):
        self.optimizer = SimpleNamespace(overflow=True)

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float:
        return math.inf


def test_an_update_that_was_not_made_is_not_counted():
    """AdamW's correction of its first moments goes by the number of updates."""
    config = config_from_tree(compose_tree(["model=tiny", "model.layers=1", "model.dim=32", "model.vocab_size=50"]))
    model = Decoder(config.model)
    flat = FlatOptimizer(build_optimizer(model, config.optim), dict(model.named_parameters()))
    assert DeepSpeedEngine(Overflowing(), flat, torch.device("cpu")).step() == math.inf
    assert {group["step"] for group in flat.param_groups} == {0}


def test_codes_are_not_made_twice_of_one_result(tmp_path):
    with pytest.raises(ValueError, match=r"memory.compress=int8 .* parallel.zero=3: .*; give memory.compress=none, "):
        run_of(tmp_path, "parallel.zero=3", "memory.compress=int8")


HERE = {
    "qwz": (("parallel.zero=3", "parallel.deepspeed.qwz=true"), r"parallel.deepspeed.qwz=true: .* kernels for GPUs"),
    "qgz": (("parallel.zero=3", "parallel.deepspeed.qgz=true"), r"parallel.deepspeed.qgz=true: .* kernels for GPUs"),
    "fp16": (("precision=fp16",), r"precision=fp16 with parallel.backend=accelerate: .* give precision=bf16"),
    "no folder": (
        ("parallel.zero=3", "parallel.deepspeed.offload_params=/nowhere"),
        r"offload_params=/nowhere: there is no such folder; possible are null, cpu",
    ),
}


@pytest.mark.parametrize("what", HERE)
def test_what_this_machine_cannot_do_of_it_is_refused(tmp_path, what):
    words, message = HERE[what]
    with pytest.raises(ValueError, match=message):
        check_engine_here(run_of(tmp_path, *words), "cpu")


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """An empty folder for what torch compiles."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


OFFLOADED = ("parallel.zero=3", "parallel.deepspeed.offload_optimizer=cpu")


def test_what_is_compiled_at_the_first_start_is_said(tmp_path, extensions):
    config = run_of(tmp_path, *OFFLOADED)
    assert builds.check_builds(run_of(tmp_path, "parallel.zero=3")) is None, "nothing to compile"
    said = builds.check_builds(config)
    assert (
        said.startswith("DeepSpeed compiles cpu_adam at this start, once: about 2 minutes") and str(extensions) in said
    )
    (extensions / "cpu_adam").mkdir(parents=True)
    (extensions / "cpu_adam" / "cpu_adam.so").touch()
    assert builds.check_builds(config) is None, "it is there"


def test_where_nothing_compiles_it_is_refused(tmp_path, extensions, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"offload_optimizer=cpu: DeepSpeed compiles cpu_adam .* no c\+\+ and no ninja; install",
    ):
        builds.check_builds(run_of(tmp_path, *OFFLOADED))


def test_files_without_libaio_are_refused(tmp_path, extensions, monkeypatch):
    monkeypatch.setattr(builds.ctypes.util, "find_library", lambda name: None)
    config = run_of(tmp_path, "parallel.zero=3", f"parallel.deepspeed.offload_params={tmp_path}")
    with pytest.raises(
        ValueError, match=r"offload_params=\S+: .*libaio, which is not installed .*apt install libaio-dev"
    ):
        builds.check_builds(config)


def test_the_lock_of_a_killed_compiler_is_named(tmp_path, extensions):
    """torch would wait for it for ever, without a word."""
    (extensions / "cpu_adam").mkdir(parents=True)
    (extensions / "cpu_adam" / "lock").touch()
    with pytest.raises(
        ValueError, match=r"cpu_adam/lock was left by a compilation that was killed: .*; remove \S+cpu_adam"
    ):
        builds.check_builds(run_of(tmp_path, *OFFLOADED))
