"""Where a run starts from: nothing, the newest checkpoint of its own, or a checkpoint it was given. Decided on rank 0,
before any process group exists."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from rowwise.conf.option import Resume, keys_that
from rowwise.optim.sparse.config import TimedBase, every
from rowwise.trainer.adapters.config import AdaLora
from rowwise.trainer.config import TrainConfig, schedule_of, tree_of
from rowwise.trainer.convert.find import is_deepspeeds
from rowwise.trainer.keys import as_lists, flat, told_apart
from rowwise.trainer.manifest import (
    Manifest,
    OtherVersion,
    damage,
    find_checkpoints,
    had_checkpoints,
    is_rolled_back,
    read_manifest,
)
from rowwise.trainer.metadata import METADATA, read_metadata
from rowwise.trainer.metrics import Recorded, read_metrics
from rowwise.trainer.same_code import refuse_other_code

# What was so before it was kept, where no default says so.
BEFORE: dict[str, Any] = {
    "sparsity.name": "none",
    "adapter.name": "none",
    "on_spike": "record",
    "memory.fused_loss": False,
}


def model_facts(config: TrainConfig) -> dict[str, Any]:
    """Returns what a checkpoint must agree in: the shape of the model."""
    return _facts("fixed", config, "model")


def state_facts(config: TrainConfig) -> dict[str, Any]:
    """Returns what the optimizer's states, the masks and the adapter are made of; a checkpoint must agree in it too."""
    facts = _facts("fixed", config, "optim")
    facts["optim.assign"] = facts.pop("optim.assign")  # the last, as in every manifest
    facts |= _facts("fixed", config, "sparsity") | _facts("fixed", config, "adapter")
    for chosen in ("adapter.forms", "adapter.ranks"):
        if facts.get(chosen, {}) is None:
            del facts[chosen]  # which the checkpoint says
    if isinstance(config.sparsity, TimedBase):
        # Times that moved with `steps` would change masks that were meant to stay.
        facts["sparsity.start_at"] = config.sparsity.first_step(config.steps)
        facts["sparsity.stop_at"] = config.sparsity.last_step(config.steps)
        if isinstance(gap := getattr(config.sparsity, "update_every", None), float):
            facts["sparsity.update_every"] = every(gap, config.steps)
    if isinstance(config.adapter, AdaLora):
        facts["adapter.start"], facts["adapter.stop"] = config.adapter.times(config.steps)
    return facts


def data_facts(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """Returns what the order of the data is made of."""
    asked = _facts("ask", config) | _facts("ask", config, "batch") | _facts("ask", config, "data")
    return asked | {"the data": data_fingerprint}


def _facts(say: Resume, config: TrainConfig, group: str = "") -> dict[str, Any]:
    """Key -> value of the fields of a group, or of the run itself, that say so."""
    part, tree = (getattr(config, group), tree_of(config)[group]) if group else (config, tree_of(config))
    return {f"{group}.{key}" if group else key: tree[key] for key in keys_that(say, part)}


def find_resume(config: TrainConfig, data_fingerprint: str, rolled_back: bool = False) -> list[Path]:
    """Finds the checkpoints to try, the newest first; empty: start from nothing. `rolled_back`: the run's own, whatever `resume`
    names, for it goes back within itself.

    Raises ValueError where `resume` names none, where the run folder has checkpoints that `resume` would pass over, where all
    of its checkpoints are lost, where a checkpoint is of another model, and where `resume=auto` would go on in a run whose data
    or seed has changed. (A path may: that is how a run goes on with other data.)
    """
    run_dir = Path(config.run_dir)
    own, records = find_checkpoints(run_dir), read_metrics(run_dir)
    begins = config.resume == "never" and not rolled_back
    if begins and (own or records):
        raise ValueError(
            f"resume=never, but run_dir={config.run_dir} already holds a run, which would be lost; "
            "give resume=auto to go on with it, or another name"
        )
    if records and not own and had_checkpoints(run_dir):
        raise ValueError(
            f"run_dir={config.run_dir} has records up to step {max(r['step'] for r in records)}, and its checkpoints are gone: "
            "bring them back, or give another name to begin anew"
        )
    if begins:
        return []
    # A run that has begun goes on with its own, also when its command, started again, names where it began.
    auto = config.resume == "auto" or _began_from(own, config.resume)
    found = own if auto or rolled_back or _went_back_from(own, config.resume) else _given(config, own)
    complaints = []
    for checkpoint in found:
        try:
            manifest = read_manifest(checkpoint)
        except OtherVersion:
            raise
        except ValueError as error:
            complaints.append(f"{checkpoint}: {error}")
            continue  # reported and passed over by checkpoint.load_first_sound
        if not damage(checkpoint, [item for item in manifest["files"].items() if item[0] == METADATA]):
            read_metadata(checkpoint)  # refused here, where one line can say why
        advice = "give the same, or another name"
        shape = completed(manifest["model"], config)
        _refuse_difference(checkpoint, shape, model_facts(config), "is of another model", advice)
        states = completed({**_gap(manifest), **manifest["model"], **manifest.get("states", {})}, config)
        _refuse_difference(checkpoint, states, state_facts(config), "holds other optimizer states", advice)
        _refuse_second_source(checkpoint, manifest, config)
        refuse_other_code(checkpoint, manifest, config)
        if auto:
            advice = f"to go on with it on purpose, give another name and resume={checkpoint}"
            kept = {f"optim.{key}": value for key, value in manifest["config"]["optim"].items()}
            now = _facts("ask", config, "optim")
            _refuse_difference(checkpoint, kept, now, "keeps its parameters otherwise", advice)
            _refuse_difference(
                checkpoint, manifest["data"], data_facts(config, data_fingerprint), "read other data", advice
            )
    if len(complaints) == len(found) > 0:
        raise ValueError(none_left(complaints))
    return found


def refuse_other_steps(config: TrainConfig, checkpoints: list[Path], data_fingerprint: str) -> None:
    """Refuses `tokens` and `epochs` of a run that goes on from steps of another batch, or by epochs of other data: what it has
    read is then no multiple of its step. Raises ValueError with the steps that are meant, where they are known."""
    if config.tokens is None and config.epochs is None:
        return
    for checkpoint in checkpoints:
        try:
            manifest = read_manifest(checkpoint)
        except ValueError:
            continue
        key = "tokens" if config.tokens is not None else "epochs"
        asked, state, run = f"{key}={getattr(config, key)}", manifest["state"], config.length
        if key == "epochs" and manifest["data"].get("the data") != data_fingerprint:
            raise ValueError(f"{asked}, and checkpoint {checkpoint} read other data before; give steps")
        # Not the position: a rollback passes over data that no step is counted for.
        if state["tokens"] != state["step"] * run.step_tokens:
            left = max(0, (config.tokens or 0) - state["tokens"]) // run.step_tokens
            meant = "" if config.tokens is None else f"={state['step'] + left}"
            raise ValueError(
                f"{asked}, and the steps before checkpoint {checkpoint} were not of batch.global_size={config.batch.global_size} "
                f"x batch.seq_len={config.batch.seq_len}; give steps{meant}"
            )
        return


def none_left(complaints: list[str]) -> str:
    """Returns what is said where no checkpoint of a run is sound."""
    return f"no sound checkpoint is left: {'. '.join(complaints)}; mend one, or give another name to begin anew"


def told_of(checkpoint: Path, config: TrainConfig) -> str:
    """Returns what is said of a run that goes on from `checkpoint`: also that it is not the one that `resume` names."""
    again = config.resume not in ("auto", "never") and checkpoint in find_checkpoints(Path(config.run_dir))
    began = f"; the run began from resume={config.resume}, and goes on with its own" if again else ""
    return f"resumed from {checkpoint}{began}"


def recorded_by(checkpoint: Path, manifest: Manifest, config: TrainConfig) -> Recorded:
    """Returns what is known of the records of a run that goes on from `checkpoint`: none are there yet where that is of another."""
    if checkpoint.resolve() not in [own.resolve() for own in find_checkpoints(Path(config.run_dir))]:
        return Recorded(manifest["step"])
    return Recorded(**manifest.get("records", {"began": None, "sha256": None}))


def changes(manifest: Manifest, config: TrainConfig) -> list[str]:
    """Returns what a run that goes on from the checkpoint of `manifest` does otherwise from here on: every key that differs, and the
    learning rate of the step before and of the step after."""
    before, now = flat(manifest["config"]), flat(tree_of(config))
    before = {key: value for key, value in completed(before, config).items() if key in now or key in before}
    apart = keys_that("apart", config)
    keys = [key for key in before | now if key not in apart and before.get(key) != now.get(key)]
    if not keys:
        return []
    pairs = {key: told_apart(before.get(key), now.get(key)) for key in keys}
    told = ", ".join(f"{key} {theirs} -> {ours}" for key, (theirs, ours) in pairs.items())
    step = manifest["step"]
    lines = [f"changed since: {told}"]
    if step < config.steps:
        was, becomes = (
            rate_of(manifest["config"], step - 1),
            config.optim.lr * config.schedule.factor(step, config.steps),
        )
        old = "an unknown one" if was is None else f"{was:.3g}"
        lines.append(f"the learning rate goes from {old} at step {step} to {becomes:.3g} at step {step + 1}")
    return lines


def completed(before: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Returns what was kept, key -> value, with what a release did that did not know the other keys: the defaults of a model's, and
    of those of groups of which there is the same choice."""
    found = {**BEFORE, **before}
    for group, choice in vars(config).items():
        same = group == "model" or found.get(f"{group}.name") == getattr(choice, "name", None)
        for key in fields(choice) if is_dataclass(choice) and same else ():
            if key.default is not MISSING:
                found.setdefault(f"{group}.{key.name}", as_lists(key.default))
            elif key.default_factory is not MISSING:
                found.setdefault(f"{group}.{key.name}", key.default_factory())
    # Before a stretch said of which kind it is, all were Llama 3's.
    if isinstance(scaling := found.get("model.rope_scaling"), dict):
        found["model.rope_scaling"] = {**scaling, "kind": scaling.get("kind", "llama3")}
    elif "model.rope_scaling.factor" in found:
        found.setdefault("model.rope_scaling.kind", "llama3")
    return found


def rate_of(tree: Mapping[str, Any], step: int) -> float | None:
    """Returns the learning rate of a step, counted from 0, under the configuration of a manifest; None where this release cannot
    read it."""
    try:
        schedule = schedule_of(tree["schedule"])
        return tree["optim"]["lr"] * schedule.factor(step, tree["steps"])
    except (KeyError, TypeError, ValueError):
        return None


def _given(config: TrainConfig, own: list[Path]) -> list[Path]:
    """The checkpoints that `resume` names by a path. Raises ValueError where there are none, or `own` would be passed
    over for them."""
    given = find_checkpoints(Path(config.resume).expanduser())
    if not given and is_deepspeeds(Path(config.resume).expanduser()):
        raise ValueError(
            f"resume={config.resume} is a checkpoint of DeepSpeed: make it a run first, by rowwise convert from={config.resume} "
            "to=runs/NAME and these arguments, then give resume=runs/NAME"
        )
    if not given:
        raise ValueError(
            f"resume={config.resume}: no checkpoint there; give auto, never, or the path of a run or of a checkpoint "
            "(runs/NAME/checkpoints/step-00000100)"
        )
    if not own or given[0].resolve() == own[0].resolve():
        return given
    if given[0].resolve() in [checkpoint.resolve() for checkpoint in own]:
        raise ValueError(
            f"resume={config.resume}: this run has a later checkpoint, {own[0].name}, which would be lost; "
            "give another name to branch off, or move the later ones away"
        )
    raise ValueError(
        f"resume={config.resume}, but run_dir={config.run_dir} already holds a run that did not begin there, with its own "
        f"{own[0].name}; give resume=auto to go on with that, or another name to begin from resume={config.resume}"
    )


def _began_from(own: list[Path], path: str) -> bool:
    """Whether the newest of a run's own checkpoints was saved by a command with `resume=path`."""
    for checkpoint in own:
        try:
            return _same_path(read_manifest(checkpoint)["config"]["resume"], path)
        except ValueError:
            continue
    return False


def _went_back_from(own: list[Path], path: str) -> bool:
    """Whether `path` was a checkpoint of the run, beyond the one that a spike sent it back to."""
    named = Path(path).expanduser()
    return bool(own) and named.parent.resolve() == own[0].parent.resolve() and is_rolled_back(named)


def _gap(manifest: Manifest) -> dict[str, Any]:
    """The steps between two changes of masks, which are no fact where they were said as steps: a later run may change those."""
    gap = flat(manifest["config"]).get("sparsity.update_every")
    return {} if gap is None else {"sparsity.update_every": every(gap, manifest["config"]["steps"])}


def _refuse_second_source(checkpoint: Path, manifest: Manifest, config: TrainConfig) -> None:
    """Refuses `init_from` of a run that goes on from weights that did not begin there: it would be ignored."""
    for group in ("model", "adapter"):
        tree: Mapping[str, Any] = manifest["config"]
        there = tree.get(group, {}).get("init_from")
        here = getattr(getattr(config, group), "init_from", None)
        if here is not None and (there is None or not _same_path(there, here)):
            raise ValueError(
                f"{group}.init_from={here}, but the run goes on from checkpoint {checkpoint}, whose weights began from "
                f"{there or 'random numbers'}; leave {group}.init_from out, or give another name to begin from it"
            )


def _same_path(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _refuse_difference(checkpoint: Path, there: dict, here: dict, what: str, advice: str) -> None:
    different = [key for key in here if there.get(key) != here[key]]
    if different:
        told = {key: told_apart(there.get(key), here[key]) for key in different}
        pairs = ", ".join(f"{key}={theirs} there and {ours} here" for key, (theirs, ours) in told.items())
        raise ValueError(f"checkpoint {checkpoint} {what}: {pairs}; {advice}")
