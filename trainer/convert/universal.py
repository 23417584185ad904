"""DeepSpeed's universal checkpoint: a folder for every parameter, a file for every state of it.

    global_step100_universal/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    global_step100_universal/zero/optimizer_state.pt                    settings of the groups, the loss scaler
    global_step100_universal/mp_rank_00_model_states.pt                 counts (stages 1 and 2; zero_pp_rank_0_... for stage 3)
    latest_universal                                                    the name of that folder

(deepspeed.checkpoint.ds_to_universal writes it, deepspeed.checkpoint.universal_checkpoint and stage3 load it; of 0.19.8.)
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowwise.kernels.spec import Specs
from rowwise.trainer.convert.foreign import MASTER, Foreign, as_written_by_deepspeed, counts_of, key_of
from rowwise.trainer.convert.names import refuse_rows
from rowwise.trainer.convert.pickles import DynamicScaler, load, save
from rowwise.trainer.convert.zero import MODEL_STATES, clip_norm_of, grouped, read_model_states, shapes_of
from rowwise.trainer.files import new_folder, write_whole
from rowwise.trainer.metadata import read_metadata
from rowwise.trainer.models.decoder import parameter_specs
from rowwise.trainer.models.huggingface import their_name
from rowwise.trainer.resume import rate_of
from rowwise.trainer.whole import Source, read_tensors

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
AS_VERSION = "0.19.8"  # of DeepSpeed, whose form is written
# DeepSpeed pairs groups of settings with its optimizer's own, and passes over those beyond: more than any script has.
GROUPS = 1024


@dataclass(frozen=True)
class Script:
    """The script of DeepSpeed that is to go on: the `names` of its parameters (huggingface or rowwise), and whose `adam` it has
    (torch or deepspeed)."""

    names: str
    adam: str


def read_universal(folder: Path) -> Foreign:
    """Reads where everything of a universal checkpoint stands, and no numbers. Raises ValueError."""
    model_states, path = read_model_states(folder)
    zero = folder / "zero"
    common = load(zero / "optimizer_state.pt")
    found = {place.name: _states(place) for place in sorted(zero.iterdir()) if place.is_dir()}
    steps = [states.pop(STEP) for states in found.values() if STEP in states]
    with as_written_by_deepspeed(zero / "optimizer_state.pt"):
        inner = common.get("optimizer_state_dict", {}).get("state", {})
        steps += [state[STEP] for state in inner.values() if STEP in state]
        settings, scaler = common["param_groups"], common.get("loss_scaler")
    with as_written_by_deepspeed(path):
        groups = shapes_of(model_states)
        # Those of parts, where tensor parallelism had cut what is whole here.
        whole = model_states.get("mp_world_size", 1) == 1
        shapes = {name: shape for group in groups for name, shape in group.items() if whole}
        counts = counts_of(model_states, next(iter(steps), None))
        pieces = {name: {state: [tensor] for state, tensor in states.items()} for name, states in found.items()}
        known = grouped(groups, settings) if len(groups) == len(settings) else []
        return Foreign(folder, pieces, shapes, known, counts, scaler, clip_norm_of(model_states))


def _states(place: Path) -> dict[str, Any]:
    """The states of a parameter: tensors, of which converters of stage 3 write flat ones, the others with more beside them."""
    found: dict[str, Any] = {}
    for path in sorted(place.glob("*.pt")):
        tree = load(path)
        value = tree.get("param") if isinstance(tree, dict) else tree
        if path.stem != STEP and not isinstance(value, Tensor):
            raise ValueError(f"{path} is not as DeepSpeed writes it (it holds no tensor)")
        found[path.stem] = value
    if MASTER not in found:
        raise ValueError(f"{place} has no {MASTER}.pt: it is no whole checkpoint")
    return found


def write_universal(source: Source, folder: Path, script: Script) -> str:
    """Writes a checkpoint of ours as a universal one, a state of a parameter in memory at a time, and returns what it did, in a
    line. Raises ValueError for runs whose states have no counterpart there."""
    specs = parameter_specs(source.model)
    _require_adamw(source, specs)
    if script.names != "rowwise":
        refuse_rows(specs, "the script has the names of transformers")
    names = {name: name if script.names == "rowwise" else their_name(name, spec) for name, spec in specs.items()}
    state, tag = source.manifest["state"], f"global_step{source.manifest['step']}_universal"
    step = torch.tensor(float(state["updates"])) if script.adam == "torch" else state["updates"]
    with new_folder(folder) as partial:
        for ours, theirs in names.items():
            place = partial / tag / "zero" / theirs
            place.mkdir(parents=True)
            for key in (MASTER, *MOMENTS):
                save({"param": _read(source, key_of(ours, key), specs[ours].shape), "cat_dim": 0}, place / f"{key}.pt")
            save(step, place / f"{STEP}.pt")
        save(_optimizer_state(source, step), partial / tag / "zero" / "optimizer_state.pt")
        said = _model_states(source, OrderedDict((names[name], spec.shape) for name, spec in specs.items()))
        for name in MODEL_STATES:
            save(said, partial / tag / name)
        write_whole(partial / "latest_universal", tag)
    numbers = sum(spec.shape.numel() for spec in specs.values())
    return f"{source.checkpoint} -> {folder / tag}: {numbers:,} parameters, {source.manifest['step']:,} steps"


def _require_adamw(source: Source, specs: Specs) -> None:
    config, checkpoint = source.config, source.checkpoint
    found = read_metadata(checkpoint).state_dict_metadata
    needed = {key_of(name, key): spec.shape for name, spec in specs.items() for key in (MASTER, *MOMENTS)}
    if (adapter := config.get("adapter", {"name": "none"})["name"]) != "none":
        raise ValueError(
            f"{checkpoint} is of adapter={adapter}, beside which weights are frozen, and a universal checkpoint of DeepSpeed has "
            "states of every weight; rowwise export gives the weights"
        )
    mixed = " with optim.assign" if config["optim"].get("assign") else ""
    if any(getattr(found.get(key), "size", None) != shape for key, shape in needed.items()):
        raise ValueError(
            f"{checkpoint} is of optim={config['optim']['name']}{mixed}, whose states have no counterpart in DeepSpeed's universal "
            "checkpoint; possible is optim=adamw for every parameter, none of them frozen, or rowwise export for the weights alone"
        )
    if config["precision"]["name"] == "fp64":
        raise ValueError(
            f"{checkpoint} is of precision=fp64, and DeepSpeed keeps 32 bits; rowwise export gives the weights"
        )
    if config.get("sparsity", {"name": "none"})["name"] != "none":
        raise ValueError(
            f"{checkpoint} is of sparsity={config['sparsity']['name']}, and DeepSpeed has no masks: its weights would fill up; "
            "rowwise export gives them as they are"
        )


def _read(source: Source, key: str, shape: torch.Size) -> Tensor:
    tensor = torch.empty(shape)
    read_tensors(source.checkpoint, {key: tensor})
    return tensor


def _optimizer_state(source: Source, step: Any) -> dict[str, Any]:
    """What stage 3 reads of the optimizer, and what the others do. A group's weight decay is the script's: which parameters are in
    it is not known here."""
    optim, precision = source.config["optim"], source.config["precision"]
    settings: dict[str, Any] = {key: optim[key] for key in ("betas", "eps") if key in optim}
    # The next step's, since a schedule sets it behind each step.
    if (rate := rate_of(source.config, min(source.manifest["step"], source.config["steps"] - 1))) is not None:
        settings["lr"] = rate
    groups = [settings] * GROUPS
    tree: dict[str, Any] = {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {STEP: step}}, "param_groups": groups},
        "ds_version": AS_VERSION,
    }
    if precision["name"] == "fp16":
        tree |= {"loss_scaler": scaler_of(source.manifest["state"], precision), "dynamic_loss_scale": True}
    return tree


def scaler_of(state: Mapping[str, Any], precision: Mapping[str, Any]) -> DynamicScaler:
    """Returns the scaler of DeepSpeed that doubles next when ours would."""
    scaler, ours = DynamicScaler(), state["loss_scale"]
    vars(scaler).clear()
    vars(scaler).update(
        cur_scale=ours["scale"],
        dynamic=True,
        cur_iter=state["step"],
        last_overflow_iter=state["step"] - ours["good_steps"] - 2,
        scale_factor=2.0,
        scale_window=precision["growth_every"],
        min_scale=1.0,
        delayed_shift=1,
        cur_hysteresis=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.float16,
    )
    return scaler


def _model_states(source: Source, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The counts. `lr_scheduler`: what torch's and DeepSpeed's own read of theirs; parameters are read from zero/ alone."""
    state = source.manifest["state"]
    step = state["step"]
    return {
        "module": OrderedDict(),
        "buffer_names": [],
        "param_shapes": [shapes],
        "shared_params": {},
        "frozen_param_shapes": OrderedDict(),
        "lr_scheduler": {
            "last_epoch": step,
            "_step_count": step + 1,
            "lr_lambdas": [],
            "last_batch_iteration": step - 1,
        },
        "global_steps": step,
        "global_samples": state["position"],
        "skipped_steps": state["loss_scale"]["skipped"],
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"gradient_clipping": source.config["clip_norm"]},
        "ds_version": AS_VERSION,
    }
