"""Global batches -> this rank's micro-batches, prepared ahead of the training thread.

Step t of a run reads samples [position, position + global_size) of the order (`order.py`); data rank d of D takes
the d-th of D equal runs of them, and ranks that share sequences a part of each. The set, and so the loss and every
gradient, is the same on every layout.
"""

import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from rowwise.conf.option import Ask, MayChange
from rowwise.kernels.visible import Documents, document_pairs
from rowwise.trainer.data.corpus import IGNORE, Sample, padding
from rowwise.trainer.data.mixture import AnyCorpus

Item = TypeVar("Item")


@dataclass(frozen=True)
class BatchConfig:
    """`global_size`: sequences per optimizer step over all ranks. `global_tokens`: its tokens, where they were asked for in
    its place. `micro_size`: sequences per forward. `seq_len`: tokens of a sequence."""

    global_size: MayChange[int] = 16
    global_tokens: MayChange[int | None] = None
    micro_size: MayChange[int] = 8
    seq_len: Ask[int] = 256

    @property
    def positions(self) -> int:
        """Tokens of a global batch, whether they have a label or not."""
        return self.global_size * self.seq_len


@dataclass(frozen=True)
class MicroBatch:
    """int64 tensors (B, S), of whole sequences or of this rank's part of them. `documents` is None where attention does
    not stop at documents; it is always of whole sequences. `first`: the number of its first sequence in the order of the data,
    where it is of training; those behind it follow. `sources` (K, B), float64: 1 where a sequence is of that source, of a mixture of
    K; None where there is one."""

    inputs: Tensor
    labels: Tensor
    positions: Tensor
    documents: Documents | None
    first: int = 0
    sources: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        return self._every(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "MicroBatch":
        return self._every(Tensor.pin_memory)

    def at(self, positions: Tensor) -> "MicroBatch":
        """The part at these positions of every sequence. Places beyond the end are padding, with no label: no token sees
        them."""
        inside, real = positions.clamp_max(self.inputs.size(1) - 1), positions < self.inputs.size(1)
        part = self._each(lambda tensor: tensor[:, inside])
        return replace(part, labels=part.labels.where(real, IGNORE))

    def _every(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed = self._each(change)
        return changed if self.sources is None else replace(changed, sources=change(self.sources))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        inputs, labels, positions = map(change, (self.inputs, self.labels, self.positions))
        return replace(self, inputs=inputs, labels=labels, positions=positions)


MOST_TOKENS = 1 << 32  # of a step
MOST_MICRO_BATCHES = 1 << 16  # of a rank in a step: each is a forward, and a place in a schedule
BYTES_A_TOKEN = 24  # on the host: input, label and position
STEPS_AT_ONCE = 4  # of which batches are on the host: the one at work, those ready, the one that is made


def batch_bytes(config: BatchConfig, data_degree: int) -> int:
    """What a rank keeps of batches in host memory."""
    return STEPS_AT_ONCE * BYTES_A_TOKEN * config.global_size * config.seq_len // data_degree


def check_batch(config: BatchConfig, data_degree: int) -> None:
    """Refuses a batch that does not divide, or that no host holds. Raises ValueError."""
    for key in ("global_size", "micro_size", "seq_len"):
        if getattr(config, key) < 1:
            raise ValueError(f"batch.{key}={getattr(config, key)}: it is at least 1")
    if (tokens := config.global_size * config.seq_len) > MOST_TOKENS:
        raise ValueError(
            f"batch.global_size={config.global_size} batch.seq_len={config.seq_len}: {tokens:,} tokens a step, which take "
            f"{batch_bytes(config, data_degree) / 1e9:,.0f} GB of host memory a rank; at most {MOST_TOKENS:,} are possible"
        )
    per_round = data_degree * config.micro_size
    if config.global_size % per_round:
        near = sorted(
            {max(1, config.global_size // per_round) * per_round, -(-config.global_size // per_round) * per_round}
        )
        asked, unit = ("global_size", 1) if config.global_tokens is None else ("global_tokens", config.seq_len)
        raise ValueError(
            f"batch.{asked}={config.global_size * unit} does not divide into {data_degree} data-parallel ranks x "
            f"batch.micro_size={config.micro_size}{' sequences' if unit > 1 else ''}; the nearest that do are "
            f"{[size * unit for size in near]}"
        )
    if (count := config.global_size // per_round) > MOST_MICRO_BATCHES:
        raise ValueError(
            f"batch.global_size={config.global_size} in {data_degree} x batch.micro_size={config.micro_size}: {count:,} "
            f"micro-batches a step, and at most {MOST_MICRO_BATCHES:,} are possible; give a larger batch.micro_size"
        )


@dataclass(frozen=True)
class Share:
    """What one rank reads of every global batch: the `rank`-th of `degree` equal runs of its samples, and of each
    sequence the tokens at `positions` (None: all)."""

    rank: int = 0
    degree: int = 1
    positions: Tensor | None = None

    def of(self, batch: MicroBatch) -> MicroBatch:
        return batch if self.positions is None else batch.at(self.positions)


def visible_pairs(
    batches: Sequence[MicroBatch], seq_len: int, pairs_of: Callable[[int], float] = document_pairs
) -> float:
    """How many pairs of a token and one that it sees, itself included, are in these whole sequences of `seq_len` tokens:
    `pairs_of` n in a document of n, or in a sequence whose attention does not stop at documents."""
    pairs = 0.0
    for batch in batches:
        begins = batch.documents.begins if batch.documents is not None else ((0,),) * len(batch.inputs)
        pairs += sum(pairs_of(end - begin) for row in begins for begin, end in pairwise((*row, seq_len)))
    return pairs


def micro_batches(indices: np.ndarray, corpus: AnyCorpus, micro_size: int, first: int = 0) -> list[MicroBatch]:
    """The samples `indices` in micro-batches of `micro_size`; the first of them is number `first` of the order. An index of -1
    is a row of padding, with no label."""
    samples = [corpus.sample(int(i)) if i >= 0 else padding(corpus.seq_len) for i in indices]
    sources = _by_source(indices, corpus) if corpus.labels else None
    return [
        replace(
            _stack(samples[i : i + micro_size], corpus.mask_documents),
            first=first + i,
            sources=None if sources is None else sources[:, i : i + micro_size],
        )
        for i in range(0, len(samples), micro_size)
    ]


def step_batches(
    corpus: AnyCorpus, config: BatchConfig, seed: int, position: int, share: Share, pin: bool
) -> Iterator[list[MicroBatch]]:
    """For ever: this rank's micro-batches of the step at `position`, then of the next."""
    mine = config.global_size // share.degree
    while True:
        first = position + share.rank * mine
        indices = corpus.drawn(first, mine, f"train/{seed}")
        batches = [share.of(batch) for batch in micro_batches(indices, corpus, config.micro_size, first)]
        yield [batch.pin() for batch in batches] if pin else batches
        position += config.global_size


def step_digests(corpus: AnyCorpus, config: BatchConfig, seed: int, position: int) -> Iterator[int]:
    """For ever, step by step from `position`: a digest below 2^20 of one sample of the step, whichever rank it is for. Every
    rank reads it, so that one whose data is not that of the others is found."""
    while True:
        chosen = position + position // config.global_size % config.global_size
        (index,) = corpus.drawn(chosen, 1, f"train/{seed}")
        sample = corpus.sample(int(index))
        yield zlib.crc32(sample.labels.data, zlib.crc32(sample.inputs.data)) >> 12
        position += config.global_size


def holdout_batches(corpus: AnyCorpus, config: BatchConfig, batches: int, share: Share) -> Iterator[MicroBatch]:
    """Returns the same held-out samples at every evaluation, `batches` global batches of them or all there are. Every rank
    gets the same number of micro-batches; what is missing is padding."""
    count = min(corpus.samples, batches * config.global_size)
    chosen = corpus.drawn(0, count, "holdout") if count else np.empty(0, dtype=np.int64)
    per_round = config.micro_size * share.degree
    padded = np.full(-(-count // per_round) * per_round, -1, dtype=np.int64)
    padded[:count] = chosen
    for row in padded.reshape(-1, share.degree, config.micro_size):
        yield share.of(micro_batches(row[share.rank], corpus, config.micro_size)[0])


class Prefetch(Generic[Item]):
    """Draws from `batches` on a thread of its own, `depth` ahead. Use as a context: leaving it ends the thread.
    An error in the thread is raised where the next batch is asked for."""

    def __init__(self, batches: Iterator[Item], depth: int = 2):
        self._batches = batches
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        # A thread starts on GPU 0, and pinning would make a context there for every worker of the machine.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def __enter__(self) -> "Prefetch[Item]":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def __next__(self) -> Item:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _fill(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            for batch in self._batches:
                if not self._offer(batch):
                    return
        except BaseException as error:  # handed to the training thread
            self._offer(error)

    def _offer(self, item: Item | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _stack(samples: list[Sample], mask_documents: bool) -> MicroBatch:
    def field(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))

    begins = tuple(tuple(np.flatnonzero(np.diff(s.documents, prepend=-1)).tolist()) for s in samples)
    return MicroBatch(
        field("inputs"), field("labels"), field("positions"), Documents(begins) if mask_documents else None
    )


def _by_source(indices: np.ndarray, corpus: AnyCorpus) -> Tensor:
    """1 where a sample is of a source, float64 (K, n); what is padding is of none."""
    found = np.zeros((len(corpus.labels), len(indices)))
    found[corpus.source_of(indices), np.arange(len(indices))] = indices >= 0
    return torch.from_numpy(found)
