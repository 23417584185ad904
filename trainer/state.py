"""What must survive a step, beside parameters and optimizer states: a few numbers, kept in the manifest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rowwise.parallel.precision import LossScale
from rowwise.trainer.spike import Spikes


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
