"""Checkpoints of a real DeepSpeed go on in a run of ours, and ours in it: tensor by tensor, and by the losses that come next.

Engines run on two or three ranks of the CPU, in processes of their own. Where DeepSpeedCPUAdam is asked for, the first on a machine
compiles it, which takes minutes.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import without_mlflow
from parity import relative_error, with_layout, write_tokens
from rowwise.launch import convert
from rowwise.launch.compose import compose_tree
from rowwise.parallel.precision import LossScale, next_loss_scale
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.convert.pickles import save
from rowwise.trainer.convert.universal import scaler_of
from rowwise.trainer.manifest import read_manifest
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import parameter_specs
from runs import final_tensors, run_train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SAVED, STEPS = 5, 10
TIMEOUT_SECONDS = 900
ROUNDING = 1e-5


def overrides_of(folder: Path, *more: str) -> list[str]:
    """A run that a script of DeepSpeed can match: attention crosses documents."""
    if not (folder / "tokens.bin").exists():
        write_tokens(folder)
    return [
        "name=moved", "precision=fp32", f"steps={STEPS}", "log_every=1000", "optim=adamw", "optim.betas=[0.9,0.95]",
        "optim.weight_decay=0.1", "optim.lr=0.01", "schedule=constant", "clip_norm=0.5",
        "model.layers=2", "model.dim=30", "model.heads=3", "model.kv_heads=1", "model.ffn_dim=37", "model.init_std=0.2",
        "model.vocab_size=61", "model.norm_eps=1e-6", "data=tokens", f"data.files=[{folder}/tokens.bin]", "data.separator=0",
        "data.mask_documents=false", "data.holdout=0.1", "batch.global_size=24", "batch.seq_len=13", "batch.micro_size=4",
        "eval.every=0", "sample.tokens=0", "checkpoint.every=0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quicker(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", without_mlflow(tmp_path_factory.mktemp("path")))
        yield


def outside() -> dict[str, str]:
    """The environment of processes of DeepSpeed's: no GPU, and what it has compiled is where it keeps it, beyond these tests."""
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"} | own


def deepspeed(folder: Path, overrides: list[str], **told: Any) -> dict[str, Any]:
    """Runs the script on its ranks, in `folder`, and returns what it said."""
    folder.mkdir()
    settings = {
        "folder": str(folder),
        "overrides": overrides,
        "world": 2,
        "names": "huggingface",
        "adam": "torch",
        **told,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("deepspeed_script.py")
    environment = outside()
    command = [sys.executable, str(script), str(folder / "settings.json")]
    logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(settings["world"])]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(TIMEOUT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(settings["world"]))
    assert codes == [0] * settings["world"], said
    return json.loads((folder / "answer.json").read_text())


def universal(saved: Path) -> None:
    """DeepSpeed's own converter, as a process."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = [
        "--input_folder",
        f"{saved}/global_step{SAVED}",
        "--output_folder",
        f"{saved}/global_step{SAVED}_universal",
    ]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*command, *folders, *workers], check=True, capture_output=True, env=outside())


def theirs_as_ours(states: dict[str, dict[str, torch.Tensor]], config: TrainConfig) -> dict[str, torch.Tensor]:
    """What DeepSpeed put together, by the names of our checkpoints."""
    found = {}
    for name, spec in parameter_specs(config.model).items():
        for key, tensor in (states.get(name) or states[spec.theirs or ""]).items():
            found[f"model.{name}" if key == "fp32" else f"optim.{name}.{key}"] = tensor.view(spec.shape)
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0 and torch.equal(found[name], tensor), name


CASES = {
    "zero 1, bf16, names of transformers": {"stage": 1, "bf16": True},
    "zero 2, our names": {"stage": 2, "names": "rowwise"},
    "zero 2, gradients round robin": {"stage": 2, "round_robin": True},
    "zero 3, names of transformers": {"stage": 3},
    "zero 3, DeepSpeed's Adam": {"stage": 3, "adam": "deepspeed"},
}
NOW = "zero 3, names of transformers"


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == NOW else pytest.mark.long) for case in CASES])
def test_a_checkpoint_of_deepspeed_goes_on_here(case, ranks, tmp_path, capsys):
    overrides, told = overrides_of(tmp_path), CASES[case]
    script = deepspeed(tmp_path / "script", overrides, steps=STEPS, save_at=SAVED, **told)
    saved, bf16 = tmp_path / "script" / "saved", told.get("bf16", False)
    states = torch.load(tmp_path / "script" / "states.pt")
    forms = [""]
    if not told.get("round_robin"):
        universal(saved)
        forms.append("_universal")
    for form in forms:
        run = tmp_path / f"run{form}"
        assert convert.main([f"from={saved}/global_step{SAVED}{form}", f"to={run}", *overrides]) == 0
        assert "warning" not in capsys.readouterr().err
        config = replace(config_from_tree(compose_tree(overrides)), run_dir=str(run))
        assert_equal(final_tensors(run), theirs_as_ours(states, config))
        manifest = read_manifest(run / "checkpoints" / f"step-{SAVED:08d}")
        assert {key: manifest["state"][key] for key in ("step", "position", "updates")} == {
            "step": SAVED, "position": SAVED * 24, "updates": SAVED,
        }  # fmt: skip
    # Onto other ranks, another stage and into a run of another name; and on in its own folder, alone.
    other = with_layout(replace(config, run_dir=str(tmp_path / "other"), resume=str(run)), 3, zero=3)
    alone = with_layout(replace(config, run_dir=str(tmp_path / "run")), 1)
    for world, going in ((3, other), (1, alone)):
        ranks.run(run_train, world, going)
        records = read_metrics(Path(going.run_dir))
        assert [record["step"] for record in records] == list(range(SAVED + 1, STEPS + 1))
        assert [r["loss"] for r in records] == pytest.approx(script["losses"][SAVED:], rel=1e-2 if bf16 else ROUNDING)
        assert [r["grad_norm"] for r in records] == pytest.approx(script["norms"][SAVED:], rel=5e-2 if bf16 else 1e-4)


@pytest.mark.parametrize(
    ("stage", "world", "names", "adam"),
    [
        pytest.param(1, 3, "rowwise", "torch", marks=pytest.mark.long),
        (2, 2, "huggingface", "torch"),
        pytest.param(3, 2, "huggingface", "deepspeed", marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_in_deepspeed(stage, world, names, adam, ranks, tmp_path):
    overrides = overrides_of(tmp_path, "checkpoint.every=5", "checkpoint.keep=0")
    config = replace(config_from_tree(compose_tree(overrides)), run_dir=str(tmp_path / "run"))
    ranks.run(run_train, 2, with_layout(config, 2, zero=2))
    keys = [f"step={SAVED}", f"names={names}", f"adam={adam}"]
    assert convert.main([f"from={config.run_dir}", f"to={tmp_path}/universal", *keys]) == 0
    told = {"stage": stage, "world": world, "names": names, "adam": adam}
    script = deepspeed(
        tmp_path / "script", overrides, steps=STEPS - SAVED, load=f"{tmp_path}/universal", save_at=STEPS, **told
    )
    loaded = theirs_as_ours(torch.load(tmp_path / "script" / "loaded.pt"), config)
    at_5 = tmp_path / "at_5" / "checkpoints"
    at_5.mkdir(parents=True)
    (at_5 / f"step-{SAVED:08d}").symlink_to(tmp_path / "run" / "checkpoints" / f"step-{SAVED:08d}")
    assert_equal(loaded, final_tensors(tmp_path / "at_5"))
    assert (script["step"], script["samples"]) == (STEPS, STEPS * 24)
    records = read_metrics(Path(config.run_dir))[SAVED:]
    assert script["losses"] == pytest.approx([record["loss"] for record in records], rel=ROUNDING)
    assert script["norms"] == pytest.approx([record["grad_norm"] for record in records], rel=1e-4)
    # And back from there: what both have come to is the same.
    assert convert.main([f"from={tmp_path}/script/saved", f"to={tmp_path}/back", *overrides_of(tmp_path)]) == 0
    back, ours = final_tensors(tmp_path / "back"), final_tensors(config.run_dir)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert relative_error(back[name], tensor) <= 1e-4, name


SCALER = """
import sys, torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
scaler = torch.load(sys.argv[1], weights_only=False)
assert type(scaler) is DynamicLossScaler
for _ in range(9):
    scaler.update_scale(False)
    print(scaler.loss_scale)
"""


def test_the_loss_scaler_is_deepspeeds_and_doubles_when_ours_does(tmp_path):
    precision = config_from_tree(compose_tree(["precision=fp16", "precision.growth_every=4"])).precision
    state = {"step": 20, "loss_scale": {"scale": 512.0, "good_steps": 2, "skipped": 0}}
    save(scaler_of(state, {"growth_every": 4}), tmp_path / "scaler.pt")
    command = [sys.executable, "-c", SCALER, str(tmp_path / "scaler.pt")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=outside()).stdout
    now, expected = LossScale(512.0, 2), []
    for _ in range(9):
        now = next_loss_scale(now, precision, overflow=False)
        expected.append(now.scale)
    assert (
        [float(word) for word in said.split()[-9:]]
        == expected
        == [512.0, 1024.0, 1024.0, 1024.0, 1024.0, *[2048.0] * 4]
    )
