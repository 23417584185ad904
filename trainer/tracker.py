"""Where metrics go beside metrics.jsonl: nowhere, Weights & Biases, or TensorBoard. Only rank 0 has one."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class NoTracker:
    name: Literal["none"] = "none"


@dataclass(frozen=True)
class Wandb:
    """`mode=offline` writes below the run directory; `wandb sync` sends it later."""

    name: Literal["wandb"] = "wandb"
    project: str = "rowwise"
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True)
class TensorBoard:
    name: Literal["tensorboard"] = "tensorboard"


TrackerConfig = NoTracker | Wandb | TensorBoard


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_tracker(config: TrackerConfig, run_dir: Path, name: str, tree: dict[str, Any], step: int) -> Tracker | None:
    """The tracker of a run that goes on after `step`; a resumed run continues the same wandb run."""
    if isinstance(config, Wandb):
        return _WandbTracker(config, run_dir, name, tree)
    if isinstance(config, TensorBoard):
        return _TensorBoardTracker(run_dir, step)
    return None


class _WandbTracker:
    def __init__(self, config: Wandb, run_dir: Path, name: str, tree: dict[str, Any]):
        import wandb

        # The id makes a resumed run the same run; it is kept beside the metrics.
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            mode=config.mode,
            dir=run_dir,
            name=name,
            id=id_file.read_text(),
            resume="allow",
            config=tree,
        )

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in record.items() if value is not None}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _flat(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is kept by layer, as `key/layer`."""
    for key, value in record.items():
        yield from ((f"{key}/{name}", v) for name, v in value.items()) if isinstance(value, dict) else ((key, value),)


class _TensorBoardTracker:
    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond its checkpoint is written again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in _flat(record):
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()
