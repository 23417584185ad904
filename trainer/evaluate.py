"""The held-out loss: the mean over every valid token of the held-out batches, the same on every layout."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rowwise.conf.option import MayChange
from rowwise.conf.refusal import Refusal, Refusals
from rowwise.optim.lengths import RunLength
from rowwise.trainer.data.batches import MicroBatch
from rowwise.trainer.engine import Engine
from rowwise.trainer.loss import mean_loss, means_by_source


@dataclass(frozen=True)
class EvalConfig:
    """`every`: how often the held-out loss is measured (an interval, also of time; 0: off; else also after the last step).
    `batches`: over how many global batches of held-out text, or as many as there are."""

    every: MayChange[int | float | str] = 100
    batches: MayChange[int] = 8

    def due(self, step: int, run: RunLength) -> bool:
        """Says whether the step alone says so; where `every` is a time, rank 0's clock may too."""
        return bool(self.every) and (step == run.steps or run.due(self.every, step))


EVALUATION: Refusals = (
    Refusal(
        ("eval.batches",),
        lambda run: run.eval.batches < 1,
        "eval.batches={eval.batches}: evaluate over at least 1 batch; eval.every=0 is off",
    ),
    Refusal(
        ("eval.every", "data.holdout"),
        lambda run: run.eval.every and run.data.holdout == 0,
        "eval.every is on and data.holdout=0 holds nothing out; give data.holdout a share, or eval.every=0",
    ),
)


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[MicroBatch]) -> tuple[float, tuple[float, ...]]:
    """Returns nats per token, and those of each source of a mixture; NaN where no token is valid. One all-reduce of two numbers, and
    two more for each source, over all ranks. Every rank must pass as many micro-batches."""
    totals = engine.losses(batches)
    dist.all_reduce(totals)
    loss, tokens, *sums = totals.tolist()
    return mean_loss(loss, tokens), means_by_source(sums)
