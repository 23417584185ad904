"""Where a run starts from: nothing, the newest checkpoint of its own, or a checkpoint it was given. Decided on rank 0,
before any process group exists."""

from pathlib import Path
from typing import Any

from rowwise.optim.sparse.config import TimedBase, stop_step
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.manifest import find_checkpoints, read_manifest

# What the facts were before they were kept.
BEFORE: dict[str, Any] = {"optim.assign": [], "sparsity.name": "none"}

MASK_FACTS = ("name", "layers", "density", "distribution", "growth", "n", "m", "start_at")


def model_facts(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must agree in: the shape of the model."""
    shape = {k: v for k, v in tree_of(config)["model"].items() if k not in ("name", "init_std", "init_from")}
    return {f"model.{key}": value for key, value in shape.items()}


def state_facts(config: TrainConfig) -> dict[str, Any]:
    """What the optimizer's states and the masks are made of; a checkpoint must agree in it too."""
    optim, sparsity = tree_of(config)["optim"], tree_of(config)["sparsity"]
    facts = {f"optim.{key}": optim[key] for key in ("name", "rank", "state_bits", "assign") if key in optim}
    facts |= {f"sparsity.{key}": sparsity[key] for key in MASK_FACTS if key in sparsity}
    if isinstance(config.sparsity, TimedBase):
        # A stop that moved with `steps` would change masks that were meant to stay.
        facts["sparsity.stop_at"] = stop_step(config.sparsity, config.steps)
    return facts


def data_facts(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """What the order of the data is made of."""
    return {
        "seed": config.seed,
        "batch.seq_len": config.batch.seq_len,
        "data.mask_documents": config.data.mask_documents,
        "the data": data_fingerprint,
    }


def find_resume(config: TrainConfig, data_fingerprint: str) -> list[Path]:
    """The checkpoints to try, the newest first; empty: start from nothing.

    Raises ValueError where `resume` names none, where a checkpoint is of another model, and where `resume=auto` would
    go on in a run whose data or seed has changed. (A path may: that is how a run goes on with other data.)
    """
    run_dir = Path(config.run_dir)
    if config.resume == "never":
        if find_checkpoints(run_dir):
            raise ValueError(
                f"resume=never, but run_dir={config.run_dir} already holds a run, which would be lost; "
                "give resume=auto to go on with it, or another name"
            )
        return []
    own = find_checkpoints(run_dir)
    given = [] if config.resume == "auto" else find_checkpoints(Path(config.resume).expanduser())
    if config.resume != "auto" and not given:
        raise ValueError(
            f"resume={config.resume}: no checkpoint there; give auto, never, or the path of a run or of a checkpoint "
            "(runs/NAME/checkpoints/step-00000100)"
        )
    if own and given and given[0].resolve() in [checkpoint.resolve() for checkpoint in own[1:]]:
        raise ValueError(
            f"resume={config.resume}: this run has a later checkpoint, {own[0].name}, which would be lost; "
            "give another name to branch off, or move the later ones away"
        )
    # A run that has begun goes on with its own, also when its command, started again, names where it began.
    found, auto = (own, True) if own or not given else (given, False)
    for checkpoint in found:
        try:
            manifest = read_manifest(checkpoint)
        except ValueError:
            continue  # reported and passed over by checkpoint.first_sound
        advice = "give the same, or another name"
        _refuse_difference(checkpoint, manifest["model"], model_facts(config), "is of another model", advice)
        states = {**manifest["model"], **manifest.get("states", {})}
        _refuse_difference(checkpoint, states, state_facts(config), "holds other optimizer states", advice)
        if auto:
            advice = f"to go on with it on purpose, give another name and resume={checkpoint}"
            kept = {"optim.param_dtype": manifest["config"]["optim"].get("param_dtype")}
            now = {"optim.param_dtype": config.optim.param_dtype}
            _refuse_difference(checkpoint, kept, now, "keeps its parameters otherwise", advice)
            _refuse_difference(
                checkpoint, manifest["data"], data_facts(config, data_fingerprint), "read other data", advice
            )
    return found


def _refuse_difference(checkpoint: Path, there: dict, here: dict, what: str, advice: str) -> None:
    there = BEFORE | there
    different = [key for key in here if there.get(key) != here[key]]
    if different:
        pairs = ", ".join(f"{key}={_short(there.get(key))} there and {_short(here[key])} here" for key in different)
        raise ValueError(f"checkpoint {checkpoint} {what}: {pairs}; {advice}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
