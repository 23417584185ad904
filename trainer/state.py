"""What must survive a step, beside parameters and optimizer states: a few numbers, kept in the manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rowwise.parallel.precision import LossScale, next_loss_scale
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.spike import Spikes, after_step
from rowwise.trainer.step import StepReport


@dataclass
class TrainState:
    """`step`: steps done. `position`: samples read. `tokens`: tokens read. `updates`: optimizer updates applied, which
    are fewer than steps where fp16 overflowed or spikes were skipped. `loss_scale`: of the next step. `spikes`: what the
    next is held against."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    updates: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    spikes: Spikes = field(default_factory=Spikes)

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "TrainState":
        spikes = Spikes.from_tree(tree["spikes"]) if "spikes" in tree else Spikes()
        return cls(**{**tree, "loss_scale": LossScale(**tree["loss_scale"]), "spikes": spikes})


def advance(state: TrainState, report: StepReport, config: TrainConfig) -> None:
    """Counts the step that was just made."""
    state.step += 1
    state.position += config.batch.global_size
    state.tokens += config.batch.positions
    state.updates += report.applied
    state.spikes = after_step(state.spikes, report.loss, report.grad_norm, report.held, config.spike)
    state.loss_scale = next_loss_scale(state.loss_scale, config.precision, overflow=not report.finite)
