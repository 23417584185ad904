"""Checkpoints of DeepSpeed by their form: every stage, number of ranks and kind of name; what is not one is refused in a line.

Here they are written as DeepSpeed writes them. `test_trainer_convert_deepspeed` has those of its real engine.
"""

import json
import os
import shutil
import sys
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import write_tokens
from rowwise.launch import convert
from rowwise.launch.compose import compose_tree
from rowwise.parallel.precision import LossScale, next_loss_scale
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.convert import pickles
from rowwise.trainer.convert.foreign import Counts, Foreign
from rowwise.trainer.convert.pickles import DynamicScaler, Scaler, Stage
from rowwise.trainer.files import fingerprint
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.prepare import examine
from runs import final_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the tests' own reading

STATES = ("fp32", "exp_avg", "exp_avg_sq")
RUN = [
    "name=moved", "precision=fp32", "steps=10", "optim=adamw", "optim.betas=[0.9,0.95]", "optim.lr=0.01", "schedule=constant",
    "clip_norm=0.5", "model.layers=2", "model.dim=30", "model.heads=3", "model.kv_heads=1", "model.ffn_dim=37",
    "model.vocab_size=61", "data=tokens", "data.separator=0", "data.holdout=0.1", "batch.global_size=24",
    "batch.seq_len=13", "batch.micro_size=4", "eval.every=0", "sample.tokens=0",
]  # fmt: skip
NAMES = {"ours": lambda name, spec: name, "theirs": lambda name, spec: f"module.{spec.theirs}"}
States = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def no_deepspeed(monkeypatch):
    """Whoever imports it fails."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


@pytest.fixture
def words(tmp_path) -> list[str]:
    write_tokens(tmp_path)
    return [*RUN, f"data.files=[{tmp_path}/tokens.bin]"]


def states_of(
    words: list[str], names: str = "ours", keys: tuple[str, ...] = STATES
) -> tuple[States, dict[str, Tensor]]:
    """Random states of every parameter by its name in a script; and by its name in a checkpoint of ours."""
    random, theirs, ours = torch.Generator().manual_seed(1), States(), dict[str, Tensor]()
    for name, spec in parameter_specs(config_from_tree(compose_tree(words)).model).items():
        theirs[NAMES[names](name, spec)] = found = {key: torch.rand(spec.shape, generator=random) for key in keys}
        ours |= {f"model.{name}" if key == "fp32" else f"optim.{name}.{key}": t for key, t in found.items()}
    return theirs, ours


def in_groups(states: States) -> list[list[str]]:
    return [[n for n, s in states.items() if (s["fp32"].dim() == 1) == vector] for vector in (False, True)]


def settings(step: Any = None) -> list[dict[str, Any]]:
    both = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, **({} if step is None else {"step": step})}
    return [{**both, "weight_decay": 0.1, "params": [0]}, {**both, "weight_decay": 0.0, "params": [1]}]


def model_states(states: States, **more: Any) -> dict[str, Any]:
    return {
        "param_shapes": [OrderedDict((n, states[n]["fp32"].shape) for n in group) for group in in_groups(states)],
        "frozen_param_shapes": OrderedDict(),
        "global_steps": 5,
        "global_samples": 120,
        "skipped_steps": 1,
        "ds_config": {"gradient_clipping": 0.5},
        **more,
    }


def cut(flat: Tensor, ranks: int) -> list[Tensor]:
    size = -(-flat.numel() // ranks)
    return list(torch.cat([flat, torch.full((size * ranks - flat.numel(),), -7.0)]).split(size))


def fills(states: States) -> list[list[int]]:
    """By how much each parameter of a group is filled up."""
    return [[-states[name]["fp32"].numel() % 8 for name in group] for group in in_groups(states)]


def save_zero(folder: Path, states: States, stage: int, ranks: int = 2, scaler: Any = None, **more: Any) -> Path:
    """Saves as an engine does."""
    tag = folder / "global_step5"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step5")
    keys = list(next(iter(states.values())))
    cuts = [
        [{k: _laid(states, group, k, ranks, stage)[rank] for k in keys} for group in in_groups(states)]
        for rank in range(ranks)
    ]
    for rank, groups in enumerate(cuts):
        inner = {
            "state": {i: {"step": torch.tensor(4.0), **{k: g[k] for k in keys[1:]}} for i, g in enumerate(groups)},
            "param_groups": settings(),
        }
        tree: dict[str, Any] = {
            "zero_stage": Stage(stage),
            "loss_scaler": scaler or _static(),
            "partition_count": ranks,
        }
        if stage == 3:
            tree |= {"optimizer_state_dict": inner, "fp32_flat_groups": [g["fp32"] for g in groups]}
        else:
            tree |= {"base_optimizer_state": inner, "single_partition_of_fp32_groups": [g["fp32"] for g in groups]}
            tree |= {"partition_count": [ranks, ranks], "param_alignment_paddings": fills(states)}
        pickles.save({"optimizer_state_dict": tree}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            pickles.save(model_states(states, **more), tag / name)
    return tag


def _laid(states: States, group: list[str], key: str, ranks: int, stage: int) -> list[Tensor]:
    """What each rank has of a state of a group."""
    flats = [states[name][key].flatten() for name in group]
    if stage < 3:
        filled = zip(flats, fills(states)[int(group[0] not in in_groups(states)[0])], strict=True)
        return cut(torch.cat([part for flat, fill in filled for part in (flat, torch.full((fill,), -7.0))]), ranks)
    return [torch.cat(parts) for parts in zip(*(cut(flat, ranks) for flat in flats), strict=True)]


def _static() -> Scaler:
    scaler = Scaler()
    scaler.cur_scale, scaler.dynamic = 1.0, False
    return scaler


def save_universal(folder: Path, states: States, flat: bool) -> Path:
    """Saves as DeepSpeed's converter does: of stage 3 flat tensors and nothing beside them."""
    tag = folder / "global_step5_universal"
    (folder / tag / "zero").mkdir(parents=True)
    (folder / "latest_universal").write_text(tag.name)
    for name, found in states.items():
        (tag / "zero" / name).mkdir()
        for key, tensor in found.items():
            torch.save(tensor.flatten() if flat else {"cat_dim": 0, "param": tensor}, tag / "zero" / name / f"{key}.pt")
        if not flat:
            torch.save(torch.tensor(4.0), tag / "zero" / name / "step.pt")
    inner = {"state": {0: {"step": torch.tensor(4.0)}}}
    common = {"param_groups": settings(), "loss_scaler": _static(), **({"optimizer_state_dict": inner} if flat else {})}
    pickles.save(common, tag / "zero" / "optimizer_state.pt")
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if flat else "mp_rank_00_model_states.pt"
    pickles.save(model_states(states), tag / name)
    return tag


def refused(capsys, *words: str) -> str:
    assert convert.main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: ") and said.count("\n") == 1, said
    return said


def assert_converted(run: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    found = final_tensors(run)
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    return read_manifest(complete_checkpoints(run / "checkpoints")[0])["state"]


@pytest.mark.parametrize(
    ("stage", "ranks", "names"),
    [(1, 1, "theirs"), (1, 3, "ours"), (2, 2, "theirs"), (3, 1, "ours"), (3, 2, "theirs"), (3, 3, "ours")],
)
def test_what_an_engine_saved_becomes_a_run(stage, ranks, names, words, tmp_path, capsys):
    states, ours = states_of(words, names)
    save_zero(tmp_path / "saved", states, stage, ranks)
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", "world_size=3", *words]) == 0
    assert "5 steps, 120 samples" in (said := capsys.readouterr()).out and not said.err
    state = assert_converted(tmp_path / "run", ours)
    assert (state["step"], state["position"], state["updates"], state["tokens"]) == (5, 120, 4, 120 * 13)
    assert state["loss_scale"] == {"scale": 1.0, "good_steps": 0, "skipped": 1}
    # The folder says what the run is, for whoever goes on with it.
    tree = compose_tree([f"{key}={value}" for key, value in _settings_of(tmp_path / "run").items()])
    assert (tree["model"]["dim"], tree["run_dir"]) == (30, str(tmp_path / "run"))


def _settings_of(run: Path) -> dict[str, Any]:
    import yaml

    tree = yaml.safe_load((run / "config.yaml").read_text())
    return {"model.dim": tree["model"]["dim"], "run_dir": tree["run_dir"]}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_universal_checkpoint_becomes_a_run(flat, inside, words, tmp_path):
    states, ours = states_of(words, "theirs")
    tag = save_universal(tmp_path / "saved", states, flat)
    assert convert.main([f"from={tag if inside else tag.parent}", f"to={tmp_path}/run", *words]) == 0
    state = assert_converted(tmp_path / "run", ours)
    assert (state["step"], state["position"], state["updates"]) == (5, 120, 4)


def test_what_tensor_parallelism_had_cut_is_whole_in_a_universal_checkpoint(words, tmp_path):
    states, ours = states_of(words)
    tag = save_universal(tmp_path / "saved", states, flat=False)
    parts = {name: {"fp32": found["fp32"][:1]} for name, found in states.items()}
    for rank in (0, 1):
        pickles.save(model_states(parts, mp_world_size=2), tag / f"mp_rank_0{rank}_model_states.pt")
    assert convert.main([f"from={tag}", f"to={tmp_path}/run", *words]) == 0
    assert_converted(tmp_path / "run", ours)


@pytest.mark.parametrize("names", [None, "rowwise"])
def test_a_run_becomes_a_universal_checkpoint_and_one_of_ours_again(names, words, tmp_path, capsys):
    states, ours = states_of(words)
    save_zero(tmp_path / "saved", states, 2)
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", *words]) == 0
    keys = [] if names is None else [f"names={names}", "adam=deepspeed", "step=5"]
    assert convert.main([f"from={tmp_path}/run", f"to={tmp_path}/universal", *keys]) == 0
    folder = tmp_path / "universal" / "global_step5_universal" / "zero"
    assert (folder / ("model.embed_tokens.weight" if names is None else "embed.weight") / "exp_avg_sq.pt").is_file()
    step = torch.load(next(folder.glob("*/step.pt")))
    assert (step == 4 and isinstance(step, Tensor)) if names is None else step == 4 and type(step) is int
    assert convert.main([f"from={tmp_path}/universal", f"to={tmp_path}/back", *words]) == 0
    assert assert_converted(tmp_path / "back", ours) == assert_converted(tmp_path / "run", ours)
    assert "warning" not in capsys.readouterr().err


def test_an_engine_is_given_the_next_steps_learning_rate(words, tmp_path):
    falling = [
        *(word for word in words if not word.startswith("schedule")),
        "schedule=cosine",
        "schedule.warmup_steps=2",
    ]
    save_zero(tmp_path / "saved", states_of(words)[0], 2)
    for source, target in (("saved", "run"), ("run", "universal")):
        assert (
            convert.main(
                [f"from={tmp_path}/{source}", f"to={tmp_path}/{target}", *(falling if source == "saved" else [])]
            )
            == 0
        )
    common = pickles.load(tmp_path / "universal" / "global_step5_universal" / "zero" / "optimizer_state.pt")
    config = config_from_tree(compose_tree(falling))
    assert {group["lr"] for group in common["param_groups"]} == {config.optim.lr * config.schedule.factor(5, 10)}
    assert config.schedule.factor(5, 10) < config.schedule.factor(4, 10)


def test_lions_momentum_goes_on_and_adams_moments_do_not_in_lion(words, tmp_path, capsys):
    lion = [word for word in words if not word.startswith("optim")] + [
        "optim=lion",
        "optim.lr=0.01",
        "optim.weight_decay=0.1",
        "optim.betas=[0.9,0.95]",
    ]
    states, ours = states_of(lion, keys=("fp32", "exp_avg"))
    save_zero(tmp_path / "saved", states, 1)
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", *lion]) == 0
    assert_converted(tmp_path / "run", ours)
    assert "keeps exp_avg, exp_avg_sq" in refused(capsys, f"from={tmp_path}/saved", f"to={tmp_path}/no", *words)
    assert "optim=lion, whose states" in refused(capsys, f"from={tmp_path}/run", f"to={tmp_path}/no")


def test_a_tied_head_is_the_embedding_by_either_name(words, tmp_path):
    tied = [*words, "model.tie_embeddings=true"]
    states, ours = states_of(tied, "theirs")
    states = {name.replace("model.embed_tokens", "lm_head"): found for name, found in states.items()}
    save_zero(tmp_path / "saved", states, 2)
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", *tied]) == 0
    assert_converted(tmp_path / "run", ours)


def dynamic(steps: int, overflow: int, window: int) -> DynamicScaler:
    scaler = DynamicScaler()
    vars(scaler).clear()
    scaler.cur_scale, scaler.dynamic, scaler.scale_window = 1024.0, True, window
    scaler.cur_iter, scaler.last_overflow_iter = steps, overflow
    return scaler


def doubled_next(scaler: DynamicScaler) -> int:
    """How many good steps later DeepSpeed's scale doubles (deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler.update_scale)."""
    for more in range(1, 100):
        since = scaler.cur_iter + more - 1 - scaler.last_overflow_iter - 1
        if since > 0 and since % scaler.scale_window == 0:
            return more
    raise AssertionError


@pytest.mark.parametrize(("steps", "overflow"), [(5, -1), (9, 3), (20, 7), (21, -1), (5, 3)])
def test_the_loss_scale_doubles_when_deepspeeds_would(steps, overflow):
    precision = config_from_tree(compose_tree(["precision=fp16", "precision.growth_every=6"])).precision
    scaler = dynamic(steps, overflow, 6)
    foreign = Foreign(Path(), {}, {}, [], Counts(steps, 1, steps - 1, 0), scaler, None)
    now, expected = foreign.loss_scale(precision), doubled_next(scaler)
    assert (now.scale, now.skipped) == (1024.0, 1)
    for _ in range(expected - 1):
        now = next_loss_scale(now, precision, overflow=False)
        assert now.scale == 1024.0
    assert next_loss_scale(now, precision, overflow=False).scale == 2048.0


def test_a_loss_scale_goes_there_and_back(words, tmp_path):
    half = [*words, "precision=fp16", "precision.growth_every=6"]
    states, ours = states_of(half)
    save_zero(tmp_path / "saved", states, 2, scaler=dynamic(5, 1, 6))
    for source, target in (("saved", "run"), ("run", "universal"), ("universal", "back")):
        assert (
            convert.main([f"from={tmp_path}/{source}", f"to={tmp_path}/{target}", *(half if source != "run" else [])])
            == 0
        )
    scales = [assert_converted(tmp_path / run, ours)["loss_scale"] for run in ("run", "back")]
    assert scales == [{"scale": 1024.0, "good_steps": 2, "skipped": 1}] * 2
    assert LossScale(**scales[0]).good_steps == 2


def test_a_loss_scaler_that_is_none_is_refused(words, tmp_path, capsys):
    scaler = dynamic(5, 1, 0)
    save_zero(tmp_path / "saved", states_of(words)[0], 2, scaler=scaler)
    said = refused(capsys, f"from={tmp_path}/saved", f"to={tmp_path}/run", *words, "precision=fp16")
    assert "global_step5 is not as DeepSpeed writes it" in said


def test_what_the_script_had_otherwise_is_told(words, tmp_path, capsys):
    save_zero(tmp_path / "saved", states_of(words)[0], 3)
    other = [
        "optim.betas=[0.9,0.999]",
        "optim.weight_decay=0.2",
        "clip_norm=1.0",
        "optim.lr=0.02",
        "batch.global_size=48",
    ]
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", *words, *other]) == 0
    said = capsys.readouterr().err
    for pair in (
        "clip_norm=0.5 there and 1 here",
        "batch.global_size=24 there and 48 here",
        "the learning rate=0.01 there and 0.02 here",
        "optim.betas=[0.9, 0.95] there and [0.9, 0.999] here",
        "optim.weight_decay=0.1 there and 0.2 here",
    ):
        assert pair in said
    assert "of vectors" not in said and said.count("\n") == 1


def test_one_parameter_is_in_memory_at_a_time(words, tmp_path, monkeypatch):
    save_zero(tmp_path / "saved", states_of(words)[0], 3, ranks=3)
    alive, most = list[weakref.ref](), 0
    whole = Foreign.whole

    def counted(self, name, state):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref((tensor := whole(self, name, state)).untyped_storage()))
        return tensor

    monkeypatch.setattr(Foreign, "whole", counted)
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", *words]) == 0
    assert len(alive) > 30 and most <= 2, "that which is written, and the one before"


class Malice:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("where", ["optim_states", "model_states", "universal"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(where, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states, _ = states_of(words)
    if where == "universal":
        path = next((save_universal(tmp_path / "saved", states, False) / "zero").glob("*/fp32.pt"))
    else:
        path = next(save_zero(tmp_path / "saved", states, 1).glob(f"*{where}.pt"))
    torch.save({"optimizer_state_dict": Malice()}, path)
    said = refused(capsys, f"from={tmp_path}/saved", f"to={tmp_path}/run", *words)
    assert f"{path} names posix.system, which no checkpoint of DeepSpeed needs" in said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_what_is_no_checkpoint_is_refused_by_name(words, tmp_path, capsys):
    states, _ = states_of(words, "theirs")
    tag, kept = save_zero(tmp_path / "saved", states, 3), tmp_path / "kept"
    shutil.copytree(tmp_path / "saved", kept)
    first, second = (tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    said = tag / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    command = f"from={tmp_path}/saved", f"to={tmp_path}/run", *words

    def after(change, expected):
        change()
        assert expected in refused(capsys, *command), expected
        assert not (tmp_path / "run").exists() and not (tmp_path / "run.incomplete").exists()
        shutil.rmtree(tmp_path / "saved")
        shutil.copytree(kept, tmp_path / "saved")

    def told(**more):
        pickles.save(model_states(states) | more, said)

    def flat(path, size):
        tree = pickles.load(path)
        tree["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.zeros(size)
        path.unlink()
        pickles.save(tree, path)

    latest = tag.parent / "latest"
    after(lambda: second.unlink(), "is of 2 ranks, and has the states of 1")
    after(lambda: first.unlink(), "has no *zero_pp_rank_0_mp_rank_00_optim_states.pt")
    after(lambda: shutil.copy(first, tag / first.name.removeprefix("bf16_")), "it was saved into twice")
    after(lambda: first.write_bytes(b"PK" + bytes(100)), "is no file of torch.save")
    after(lambda: first.write_bytes(first.read_bytes()[:3000]), "is no file of torch.save")
    after(lambda: torch.save([1], first), "is not as DeepSpeed writes it")
    after(lambda: torch.save({}, first), "is not as DeepSpeed writes it (no 'optimizer_state_dict')")
    after(lambda: said.unlink(), "it is no whole checkpoint")
    after(lambda: torch.save([1], said), "it holds a list")
    after(lambda: told(global_samples=None), "no 'global_samples'")
    after(lambda: told(global_steps="many"), "is not as DeepSpeed writes it")
    after(
        lambda: told(frozen_param_shapes={"model.norm.weight": torch.Size([30])}),
        "frozen parameters (model.norm.weight)",
    )
    after(lambda: flat(second, 10), "the others are elsewhere")
    after(
        lambda: shutil.copy(said, tag / "zero_pp_rank_0_mp_rank_01_model_states.pt"), "tensor or pipeline parallelism"
    )
    after(lambda: latest.write_text("../saved/global_step5"), "names no folder beside it")
    after(lambda: latest.write_text("global_step7"), "there is no checkpoint of ZeRO 1, 2 or 3 in")


def test_a_run_that_would_go_on_from_it_is_told_of_the_command(words, tmp_path):
    saved = save_zero(tmp_path / "saved", states_of(words)[0], 1)
    for folder in (saved, saved.parent):
        config = config_from_tree(compose_tree([*words, f"run_dir={tmp_path}/run", f"resume={folder}"]))
        with pytest.raises(
            ValueError, match=f"is a checkpoint of DeepSpeed: make it a run first, by rowwise convert from={folder}"
        ):
            examine(config, 1)


def test_names_in_it_are_no_orders_to_a_terminal(words, tmp_path, capsys):
    states, _ = states_of(words)
    save_zero(tmp_path / "saved", {**states, "\x1b[2Jgone\n": states["norm.weight"]}, 1)
    assert "has ?[2Jgone?, which the model does not have" in refused(
        capsys, f"from={tmp_path}/saved", f"to={tmp_path}/run", *words
    )


def test_another_model_and_another_rule_are_refused_by_name(words, tmp_path, capsys):
    states, _ = states_of(words, "theirs")
    save_zero(tmp_path / "saved", states, 1)

    def said(*more: str) -> str:
        return refused(capsys, f"from={tmp_path}/saved", f"to={tmp_path}/run", *words, *more)

    assert "has no model.layers.2.input_layernorm.weight" in said("model.layers=3")
    assert "has model.layers.1.input_layernorm.weight" in said("model.layers=1")
    assert "has lm_head.weight, which the model does not have" in said("model.tie_embeddings=true")
    assert "module.model.layers.0.mlp.gate_proj.weight has the shape [37, 30]" in said("model.ffn_dim=38")
    assert "and optim=lion keeps exp_avg of it" in said("optim=lion", "optim.lr=0.01")
    assert "has exp_avg, exp_avg_sq of module.model.layers.0.self_attn.q_proj.weight, and optim=muon" in said(
        "optim=muon"
    )
    assert "sparsity=rigl: a checkpoint of DeepSpeed has no masks" in said("sparsity=rigl", "sparsity.update_every=2")
    assert "the run begins with what is converted" in said("resume=auto")
    assert "the run begins with what is converted" in said("run_dir=here")
    assert "step=5: it is for runs of ours" in said("step=5")
    assert "optim.lrr" in said("optim.lrr=3")
    assert not (tmp_path / "run").exists()


def test_a_run_that_deepspeed_has_no_form_for_is_refused(words, tmp_path, capsys):
    states, _ = states_of(words)
    save_zero(tmp_path / "saved", states, 1)
    wide = [*words, "precision=fp64"]
    assert convert.main([f"from={tmp_path}/saved", f"to={tmp_path}/run", *wide]) == 0
    assert final_tensors(tmp_path / "run")["optim.norm.weight.exp_avg"].dtype == torch.float64
    command = f"from={tmp_path}/run", f"to={tmp_path}/universal"
    assert "precision=fp64, and DeepSpeed keeps 32 bits" in refused(capsys, *command)
    assert "is a run, whose checkpoints say what it is" in refused(capsys, *command, "model.dim=30")
    assert "world_size=2: from=" in refused(capsys, *command, "world_size=2")
    assert "adam=mine: possible are torch, deepspeed" in refused(capsys, *command, "adam=mine")
    assert "step=7: not one of" in refused(capsys, *command, "step=7")
    assert "exists and is not empty" in refused(capsys, f"from={tmp_path}/run", f"to={tmp_path}/saved")
    (path,) = (tmp_path / "run/checkpoints").glob("*/manifest.json")
    tree = json.loads(path.read_text())
    tree["config"]["adapter"] = {"name": "lora"}
    tree = {key: value for key, value in tree.items() if key != "checksum"}
    path.write_text(json.dumps({**tree, "checksum": fingerprint(tree)}))
    assert "is of adapter=lora, beside which weights are frozen" in refused(capsys, *command)
