"""What rank 0 tells the world about a run: metrics.jsonl, the tracker, the console. Other ranks tell nothing."""

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from rowwise.optim.build import Assignments, assignment_table, joined, state_bytes
from rowwise.optim.lengths import read_length
from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import padded_length
from rowwise.trainer.advice import told_of_sources, warnings
from rowwise.trainer.begin import Begun
from rowwise.trainer.config import TrainConfig, tree_of
from rowwise.trainer.console import Console, forecast, labelled
from rowwise.trainer.data.open import Data, data_in_words, told_of_data
from rowwise.trainer.files import write_whole
from rowwise.trainer.manifest import newest_sound
from rowwise.trainer.metrics import MetricsLog, Recorded, last_records
from rowwise.trainer.models.decoder import parameter_count
from rowwise.trainer.pace import recent_pace
from rowwise.trainer.peaks import device_name
from rowwise.trainer.plan.require import forecast_in_words
from rowwise.trainer.runlog import keep_said
from rowwise.trainer.starts import Start, keep_start
from rowwise.trainer.state import TrainState
from rowwise.trainer.summary import ending, header
from rowwise.trainer.tracker import Tracker, open_tracker


class Reporter:
    """On ranks other than 0: silence."""

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, record: dict[str, Any]) -> None: ...

    def say(self, text: str | None) -> None: ...

    def warn(self, text: str) -> None: ...

    def stand(self) -> None: ...

    def end(self, state: TrainState, writes: bool) -> None: ...

    def sync(self) -> Recorded:
        return Recorded()

    def close(self) -> None: ...


class RankZeroReporter(Reporter):
    """Writes each record to metrics.jsonl, then shows it."""

    def __init__(self, config: TrainConfig, mesh: Mesh, begun: Begun, outlets: "Outlets"):
        self._config, self._run_dir = config, Path(config.run_dir)
        tree = tree_of(config)
        write_whole(self._run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(tree)))
        step = begun.state.step
        self._metrics = MetricsLog(self._run_dir, step, begun.recorded)
        self._tracker = outlets.tracker(config, tree, step)
        log_every = config.length.in_steps(read_length("log_every", config.log_every))
        self._console = Console(self._run_dir, step, config.steps, log_every, mesh.world_size)
        for remark in self._metrics.remarks:
            self.warn(remark)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is not None:
            keep_said(self._run_dir, "".join(traceback.format_exception(error)))

    def step(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        if self._tracker is not None:
            self._tracker.log(record)
        self._console.step(record)

    def say(self, text: str | None) -> None:
        if text is not None:
            self._console.say(text)

    def warn(self, text: str) -> None:
        self._console.say(f"warning: {text}", wrong=True)

    def begin(self, mesh: Mesh, data: Data, assigned: Assignments) -> None:
        """Says what the run is, and writes parameters.txt. Raises DiskFull."""
        config = self._config
        write_whole(self._run_dir / "parameters.txt", assignment_table(assigned) + "\n")
        read = data_in_words(config.data, data)
        epochs = config.steps * config.batch.global_size / data.train.samples
        lines = header(config, mesh.world_size, device_name(mesh.device), read, epochs, state_bytes(assigned))
        if (memory := forecast_in_words(config)) is not None:
            lines.append(labelled("memory", memory))
        before = last_records(self._run_dir, 1)
        if (
            before
            and (told := forecast(recent_pace(self._run_dir), config.steps - before[-1]["step"]))
            and config.steps > before[-1]["step"]
        ):
            lines.append(told)
        self._console.header(lines)

    def stand(self) -> None:
        """Says how the last step went, when no more come."""
        self._console.close()

    def end(self, state: TrainState, writes: bool) -> None:
        """Says in a box what came out, and what to do next."""
        saved = newest_sound(self._run_dir / "checkpoints")
        self._console.end(*ending(self._config, state.step, self._console.last, self._console.seconds, saved, writes))

    def sync(self) -> Recorded:
        return self._metrics.sync()

    def close(self) -> None:
        self._console.close()
        self._metrics.close()


class Outlets:
    """What of a run is opened once, however often it is rolled back: its tracker, and its line in starts.jsonl, which says by
    which `command` it was started. As a context, it is closed."""

    def __init__(self, command: str | None):
        self._command, self._started = command, False
        self._tracker: Tracker | None = None

    def __enter__(self) -> "Outlets":
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracker is not None:
            self._tracker.close()

    def tracker(self, config: TrainConfig, tree: dict[str, Any], step: int) -> Tracker | None:
        """Returns the tracker of a run that goes on after `step`, or goes back to it."""
        if self._tracker is not None:
            self._tracker.go_back(step)
        else:
            self._tracker = open_tracker(config.tracker, Path(config.run_dir), config.name, tree, step)
        return self._tracker

    def tell_start(self, config: TrainConfig, mesh: Mesh, step: int) -> None:
        """Adds the line on rank 0, unless there is nothing left to do. Raises DiskFull."""
        if mesh.rank == 0 and not self._started and step < config.steps:
            parameters, _ = parameter_count(config.model)
            start = Start(step, mesh.world_size, device_name(mesh.device), parameters, self._command)
            keep_start(Path(config.run_dir), start)
        self._started = True


def open_reporter(
    config: TrainConfig, mesh: Mesh, data: Data, begun: Begun, parts: list[Assignments], outlets: Outlets
) -> Reporter:
    """Opens the reporter of this rank; says what the run is and where it starts. `parts`: the assignments of each stage. Raises
    DiskFull."""
    if mesh.rank != 0:
        return Reporter()
    reporter = RankZeroReporter(config, mesh, begun, outlets)
    reporter.begin(mesh, data, joined(parts))
    if mesh.sequence is not None:
        ring, ulysses, length = config.parallel.ring, config.parallel.ulysses, config.batch.seq_len
        if (padded := padded_length(length, mesh.sequence.order, ring, ulysses)) > length:
            reporter.say(
                f"sequences of {length} tokens are padded to {padded}, which {ring * ulysses} ranks share evenly"
            )
    told = told_of_data(config.data, data) + told_of_sources(config, data)
    for remark in told + warnings(config, data, mesh.device) + begun.remarks:
        if remark.startswith("warning: "):
            reporter.warn(remark.removeprefix("warning: "))
        else:
            reporter.say(remark)
    if begun.state.step >= config.steps:
        step = begun.state.step
        reporter.say(f"{config.run_dir} is complete at step {step}; raise steps= to go on, or give another name=")
    return reporter
