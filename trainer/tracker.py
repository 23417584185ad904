"""Where metrics go beside metrics.jsonl: nowhere, Weights & Biases, MLflow, trackio, or TensorBoard. Only rank 0 has one.

A run is one run there over all resumes: its id is kept in its folder. What it records again, from the checkpoint that it goes on
from, is sent again under the same step.
"""

import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from rowwise.conf.option import MayChange
from rowwise.trainer.keys import without_password


@dataclass(frozen=True)
class NoTracker:
    name: MayChange[Literal["none"]] = "none"


@dataclass(frozen=True)
class Wandb:
    """`project`: in which the run is shown. `entity`: whose project; null: the user's own. `group`: of runs that belong
    together; null: none. `mode=offline` writes below the run directory; `wandb sync` sends it later."""

    name: MayChange[Literal["wandb"]] = "wandb"
    project: MayChange[str] = "rowwise"
    entity: MayChange[str | None] = None
    group: MayChange[str | None] = None
    mode: MayChange[Literal["online", "offline"]] = "online"


@dataclass(frozen=True)
class Mlflow:
    """`experiment`: in which the run is shown. `uri`: of the server or database; null: what MLflow uses by itself
    (MLFLOW_TRACKING_URI). `group`: becomes a tag; null: none."""

    name: MayChange[Literal["mlflow"]] = "mlflow"
    experiment: MayChange[str] = "rowwise"
    uri: MayChange[str | None] = None
    group: MayChange[str | None] = None


@dataclass(frozen=True)
class Trackio:
    """`project`: in which the run is shown. `space`: a Hugging Face Space that gets the metrics; null: files of this
    machine, which `trackio show` shows. `group`: of runs that belong together; null: none."""

    name: MayChange[Literal["trackio"]] = "trackio"
    project: MayChange[str] = "rowwise"
    space: MayChange[str | None] = None
    group: MayChange[str | None] = None


@dataclass(frozen=True)
class TensorBoard:
    name: MayChange[Literal["tensorboard"]] = "tensorboard"


TrackerConfig = NoTracker | Wandb | Mlflow | Trackio | TensorBoard

PACKAGES = {
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "trackio": "trackio",
    "tensorboard": "tensorboard",
}  # by module
MOST_PARAMETERS, MOST_METRICS, LONGEST_PARAMETER = 100, 1000, 500  # that MLflow takes at a time; characters


class Tracker(Protocol):
    def log(self, record: dict[str, Any]) -> None: ...

    def go_back(self, step: int) -> None:
        """Goes back to `step`: what was logged beyond it is made, and logged, again."""

    def close(self) -> None: ...


def check_tracker(config: TrackerConfig) -> None:
    """Refuses a tracker: raises ValueError where its package is not there, and for a password, which the files of the run would
    tell."""
    if isinstance(config, Mlflow) and config.uri is not None and (shown := without_password(config.uri)) != config.uri:
        raise ValueError(
            f"tracker.uri={shown}: the run's config.yaml would hold this password; leave tracker.uri out, and give the URI as "
            "the variable MLFLOW_TRACKING_URI, which MLflow reads"
        )
    package = PACKAGES.get(config.name)
    if package is not None and find_spec(config.name) is None:
        raise ValueError(
            f"tracker={config.name}: its package is not installed; run pip install {package}, or give another tracker"
        )


def open_tracker(config: TrackerConfig, run_dir: Path, name: str, tree: dict[str, Any], step: int) -> Tracker | None:
    """Opens the tracker of a run that goes on after `step`."""
    if isinstance(config, Wandb):
        return _WandbTracker(config, run_dir, name, tree)
    if isinstance(config, Mlflow):
        return _MlflowTracker(config, run_dir, name, tree)
    if isinstance(config, Trackio):
        return _TrackioTracker(config, run_dir, name, tree)
    if isinstance(config, TensorBoard):
        return _TensorBoardTracker(run_dir, step)
    return None


class _WandbTracker:
    def __init__(self, config: Wandb, run_dir: Path, name: str, tree: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            mode=config.mode,
            dir=run_dir,
            name=name,
            id=_kept_id(run_dir / "wandb_id"),
            resume="allow",
            config=tree,
            allow_val_change=True,
        )
        # wandb's own count of steps takes none again, and after a rollback they are others.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in record.items() if value is not None})

    def go_back(self, step: int) -> None:
        """Does nothing: what is made again is sent again under the same step."""

    def close(self) -> None:
        self._run.finish()


class _MlflowTracker:
    """Sends in a thread, as many numbers at a time as wait: a server that is slow or gone holds up no step."""

    def __init__(self, config: Mlflow, run_dir: Path, name: str, tree: dict[str, Any]):
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(config.uri)
        self._run = self._begin(config, run_dir / "mlflow_run_id", name, tree)
        self._waiting: deque[Any] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sending: Future[None] | None = None
        self._complaint: str | None = None

    def _begin(self, config: Mlflow, kept: Path, name: str, tree: dict[str, Any]) -> str:
        """The id of the run there: that which is kept, or of a new one."""
        from mlflow.entities import Param

        if kept.exists():
            self._client.update_run(kept.read_text(), status="RUNNING")
            return kept.read_text()
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = self._client.create_experiment(config.experiment) if found is None else found.experiment_id
        tags = {"group": config.group} if config.group is not None else {}
        run: str = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        # MLflow lets no parameter change: they are those of the first start.
        params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in _flat(tree, ".")]
        for begin in range(0, len(params), MOST_PARAMETERS):
            self._client.log_batch(run, params=params[begin : begin + MOST_PARAMETERS])
        kept.write_text(run)
        return run

    def log(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(key, value, now, record["step"]) for key, value in _numbers(record)]
        if self._sending is None or self._sending.done():
            self._sending = self._thread.submit(self._send)

    def _send(self) -> None:
        try:
            while self._waiting:
                some = [self._waiting.popleft() for _ in range(min(MOST_METRICS, len(self._waiting)))]
                self._client.log_batch(self._run, metrics=some)
        except Exception as error:  # whatever the network has: the run goes on, and metrics.jsonl has it all
            self._complaint = str(error)

    def go_back(self, step: int) -> None:
        """Does nothing: what is made again is sent again under the same step."""

    def close(self) -> None:
        """Also sends what came as the thread was about to rest."""
        self._thread.submit(self._send)
        self._thread.shutdown()
        try:
            self._client.set_terminated(self._run)
        except Exception as error:
            self._complaint = str(error)
        if self._complaint is not None:
            print(f"warning: MLflow did not take all records: {self._complaint}", file=sys.stderr, flush=True)


class _TrackioTracker:
    def __init__(self, config: Trackio, run_dir: Path, name: str, tree: dict[str, Any]):
        import trackio

        self._run = trackio.init(
            project=config.project,
            name=f"{name}-{_kept_id(run_dir / 'trackio_id')}",  # it knows runs by their names
            group=config.group,
            space_id=config.space,
            config=tree,
            resume="allow",
            embed=False,
        )

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(dict(_numbers(record)), step=record["step"])

    def go_back(self, step: int) -> None:
        """Does nothing: what is made again is sent again under the same step."""

    def close(self) -> None:
        self._run.finish()


class _TensorBoardTracker:
    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond its checkpoint is written again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in _numbers(record):
            self._writer.add_scalar(key, value, record["step"])

    def go_back(self, step: int) -> None:
        """As at a start: whoever reads the file drops what it has of later steps."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        assert self._writer.file_writer is not None
        self._writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)

    def close(self) -> None:
        self._writer.close()


def _kept_id(path: Path) -> str:
    """The id of a run, made at its first start."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What can be drawn of a record; what is kept by layer, as `key/layer`."""
    return ((key, value) for key, value in _flat(record, "/") if key != "step" and isinstance(value, int | float))


def _flat(tree: dict[str, Any], between: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{key}{between}{name}", inner) for name, inner in _flat(value, between))
        else:
            yield key, value
