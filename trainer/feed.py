"""What this rank reads: its micro-batches of every step, prepared ahead, and its share of the held-out samples."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from rowwise.parallel.mesh import Mesh
from rowwise.parallel.sequence import positions_on
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.data.batches import (
    MicroBatch,
    Prefetch,
    Share,
    holdout_batches,
    step_batches,
    step_digests,
    visible_pairs,
)
from rowwise.trainer.data.open import Data
from rowwise.trainer.update import may_begin_next

Read = tuple[list[MicroBatch], int]  # the micro-batches of a step, and the digest of a sample that every rank reads


@dataclass(frozen=True)
class Fed:
    """What there is for a step: its micro-batches and its digest; those `ahead`, of the next, where it may be begun; this rank's
    part of the pairs that attention sees in the global batch; when the step began, and the seconds it waited for data."""

    batches: list[MicroBatch]
    digest: int
    ahead: list[MicroBatch] | None
    pairs: float
    started: float
    data_seconds: float

    def seconds(self) -> float:
        """Counts the seconds since the step began."""
        return time.perf_counter() - self.started


class Feed:
    """Gives what each step needs, from one position of the order on. As a context, it ends the thread that reads."""

    def __init__(self, config: TrainConfig, mesh: Mesh, data: Data, position: int):
        batches = train_batches(config, mesh, data, position)
        digests = step_digests(data.train, config.batch, config.seed, position)
        self._config, self._share = config, mesh.data_degree / mesh.world_size
        self._read: Prefetch[Read] = Prefetch(zip(batches, digests, strict=True))
        self._ahead: Read | None = None

    def __enter__(self) -> "Feed":
        self._read.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._read.__exit__(*error)

    def take(self, step: int) -> Fed:
        """Waits until what step t (counted from 1) needs is there."""
        started = time.perf_counter()
        batches, digest = next(self._read) if self._ahead is None else self._ahead
        self._ahead = next(self._read) if may_begin_next(self._config, step) else None
        waited = time.perf_counter() - started
        pairs = visible_pairs(batches, self._config.batch.seq_len, self._config.model.pairs) * self._share
        return Fed(batches, digest, self._ahead and self._ahead[0], pairs, started, waited)


def share_of(mesh: Mesh, seq_len: int) -> Share:
    """Returns what this rank reads of every global batch."""
    return Share(mesh.data_rank, mesh.data_degree, positions_on(mesh, seq_len))


def train_batches(config: TrainConfig, mesh: Mesh, data: Data, position: int) -> Iterator[list[MicroBatch]]:
    """Yields this rank's micro-batches, step by step, from `position` on."""
    share, pin = share_of(mesh, config.batch.seq_len), mesh.device.type == "cuda"
    return step_batches(data.train, config.batch, config.seed, position, share, pin)


def eval_batches(config: TrainConfig, mesh: Mesh, data: Data) -> Iterator[MicroBatch]:
    """Returns this rank's share of the held-out samples."""
    share = share_of(mesh, config.batch.seq_len)
    return holdout_batches(data.holdout, config.batch, config.eval.batches, share)
