"""What rank 0 tells the world about a run: metrics.jsonl, the tracker, the console. Other ranks tell nothing."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import padded_length
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.console import Console
from rowwise.trainer.files import write_whole
from rowwise.trainer.metrics import MetricsLog, Recorded
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.state import TrainState
from rowwise.trainer.tracker import open_tracker


class Reporter:
    """On ranks other than 0: silence."""

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(self, record: dict[str, Any]) -> None: ...

    def say(self, text: str | None) -> None: ...

    def sync(self) -> Recorded:
        return Recorded()

    def close(self) -> None: ...


class RankZeroReporter(Reporter):
    """Writes each record to metrics.jsonl, then shows it."""

    def __init__(self, config: TrainConfig, state: TrainState, recorded: Recorded):
        run_dir = Path(config.run_dir)
        tree = tree_of(config)
        write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(tree)))
        self._metrics = MetricsLog(run_dir, state.step, recorded)
        self.remarks = self._metrics.remarks
        self._tracker = open_tracker(config.tracker, run_dir, config.name, tree, state.step)
        self._console = Console(state.step, config.steps, config.log_every)

    def step(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        if self._tracker is not None:
            self._tracker.log(record)
        self._console.step(record)

    def say(self, text: str | None) -> None:
        if text is not None:
            self._console.say(text)

    def sync(self) -> Recorded:
        return self._metrics.sync()

    def close(self) -> None:
        self._console.close()
        self._metrics.close()
        if self._tracker is not None:
            self._tracker.close()


def open_reporter(
    config: TrainConfig, mesh: Mesh, state: TrainState, recorded: Recorded, remarks: list[str]
) -> Reporter:
    """The reporter of this rank; says what the run is and where it starts."""
    if mesh.rank != 0:
        return Reporter()
    reporter = RankZeroReporter(config, state, recorded)
    parallel, (parameters, _) = config.parallel, parameter_count(config.model)
    cut = f"pipeline {parallel.pipeline} ({parallel.pipeline_schedule}) x " if parallel.pipeline > 1 else ""
    shared = "".join(f" x {axis} {n}" for axis in ("ring", "ulysses") if (n := getattr(parallel, axis)) > 1)
    reporter.say(
        f"{config.run_dir}: {config.model.name}, {parameters:,} parameters, {config.precision.name}, {mesh.world_size} x "
        f"{mesh.device.type}, {cut}replicate {parallel.replicate} x shard {parallel.shard}{shared}, ZeRO {parallel.zero}"
    )
    if mesh.sequence is not None:
        ring, ulysses, length = parallel.ring, parallel.ulysses, config.batch.seq_len
        if (padded := padded_length(length, mesh.sequence.order, ring, ulysses)) > length:
            reporter.say(
                f"sequences of {length} tokens are padded to {padded}, which {ring * ulysses} ranks share evenly"
            )
    for remark in [*remarks, *reporter.remarks]:
        reporter.say(remark)
    if state.step >= config.steps:
        reporter.say(f"{config.run_dir} is complete at step {state.step}; raise steps= to go on, or give another name=")
    return reporter
