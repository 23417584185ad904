"""A corpus: token files, memory-mapped, cut into samples of `seq_len` + 1 tokens.

A sample is a window of the packed stream; neighbouring windows share one token, so that every token but the first is
predicted once. Document boundaries are kept as offsets beside the tokens. On disk (what `store.py` writes):

    corpus/meta.json          see `integrity.py`
    corpus/train.bin          tokens, raw            corpus/train.documents.npy     where each document starts
    corpus/holdout.bin        likewise
    corpus/train.learned.bin  of conversations (`chat/`): a byte a token, whether it is learned
    corpus/train.origins.npy  likewise: the file and the line of each
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from rowwise.trainer.data.integrity import (
    META,
    SPLITS,
    DataDamaged,
    Piece,
    Record,
    check_folder,
    file_fingerprint,
    read_record,
)
from rowwise.trainer.data.order import sample_indices
from rowwise.trainer.data.watch import Watch


@dataclass(frozen=True)
class Sample:
    """One window. `inputs`, `labels`, `positions` and `documents` are int64 (S,); a label that is not to be learned
    is IGNORE."""

    inputs: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray


class Stream(Protocol):
    """Tokens, and the samples that they are cut or packed into."""

    @property
    def tokens(self) -> np.ndarray: ...

    def windows(self, seq_len: int) -> int:
        """Counts how many samples of `seq_len` the stream holds."""
        ...

    def sample(self, index: int, seq_len: int, mask_documents: bool) -> Sample:
        """Returns one of them. Raises DataDamaged where a file is no longer there."""
        ...


@dataclass(frozen=True)
class TokenStream:
    """Packed tokens (n,) of any unsigned dtype, and the offsets at which documents start (ascending, from 0). `learned`: of each
    token whether it is (None: all are)."""

    tokens: np.ndarray
    documents: np.ndarray
    learned: np.ndarray | None = None

    def windows(self, seq_len: int) -> int:
        return max(0, (len(self.tokens) - 1) // seq_len)

    def sample(self, index: int, seq_len: int, mask_documents: bool) -> Sample:
        self.require_there()
        return cut(self, index * seq_len, seq_len, mask_documents)

    def require_there(self) -> None:
        """Raises DataDamaged where a file behind it has been cut short."""
        for mapped in (self.tokens, self.documents, self.learned):
            if mapped is not None:
                require_there(mapped)


IGNORE = -100


@dataclass(frozen=True)
class Corpus:
    """The samples of one split. `fingerprint` names the tokens and their order in the files; `watch` is told of a sample
    that cannot be read; `vocab_size`: that of the model (None: not known)."""

    streams: tuple[Stream, ...]
    seq_len: int
    mask_documents: bool
    fingerprint: str
    watch: Watch | None = None
    vocab_size: int | None = None
    labels: ClassVar[tuple[str, ...]] = ()

    @property
    def samples(self) -> int:
        return sum(stream.windows(self.seq_len) for stream in self.streams)

    @property
    def tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self.streams)

    def drawn(self, first: int, count: int, key: str) -> np.ndarray:
        """Returns the indices (n,) of the samples number `first`, ... of the order that `key` names."""
        return sample_indices(first, count, self.samples, key)

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the sources (n,) of these samples, of a corpus that has several: here there is one."""
        return np.zeros(len(indices), dtype=np.int64)

    def of_vocabulary(self, vocab_size: int) -> "Corpus":
        """Returns it for a model of so many words."""
        return replace(self, vocab_size=vocab_size)

    def sample(self, index: int) -> Sample:
        """Returns sample `index` of the corpus, in the order of the files. Where it cannot be one, `watch` is told, and it is
        padding: all ranks finish the step, and stop."""
        for stream in self.streams:
            if index < (here := stream.windows(self.seq_len)):
                return self._sound(stream, index)
            index -= here
        raise IndexError(index)

    def _sound(self, stream: Stream, index: int) -> Sample:
        try:
            sample = stream.sample(index, self.seq_len, self.mask_documents)
            self._require_tokens(sample, stream.tokens)
        except DataDamaged as damage:
            if self.watch is None:
                raise
            self.watch.complain(str(damage))
            return padding(self.seq_len)
        return sample

    def _require_tokens(self, sample: Sample, tokens: np.ndarray) -> None:
        least, most = int(sample.inputs.min()), max(int(sample.inputs.max()), int(sample.labels.max()))
        if self.vocab_size is not None and not 0 <= least <= most < self.vocab_size:
            where, token = getattr(tokens, "filename", "the data"), least if least < 0 else most
            raise DataDamaged(f"{where} holds the token {token}, and model.vocab_size={self.vocab_size}")


def cut(stream: TokenStream, start: int, seq_len: int, mask_documents: bool) -> Sample:
    """Returns the window at `start`. With `mask_documents`, positions restart at each document and the last token of a
    document is not asked to predict the first of the next. What is not to be learned is no label."""
    tokens = stream.tokens[start : start + seq_len + 1].astype(np.int64)
    inputs, labels = tokens[:-1], tokens[1:].copy()
    if stream.learned is not None:
        labels[stream.learned[start + 1 : start + seq_len + 1] == 0] = IGNORE
    positions = np.arange(start, start + seq_len)
    if not mask_documents:
        return Sample(inputs, labels, positions - start, np.zeros(seq_len, dtype=np.int64))
    owner = np.searchsorted(stream.documents, np.arange(start, start + seq_len + 1), side="right") - 1
    labels[owner[1:] != owner[:-1]] = IGNORE
    begins = np.maximum(stream.documents[owner[:-1]], start)
    return Sample(inputs, labels, positions - begins, owner[:-1] - owner[0])


def padding(seq_len: int) -> Sample:
    """Returns a sample without a label."""
    zeros = np.zeros(seq_len, dtype=np.int64)
    return Sample(zeros, np.full(seq_len, IGNORE), np.arange(seq_len), zeros)


def is_corpus(folder: Path) -> bool:
    """Says whether a folder is one that Rowwise wrote, whole or not."""
    there = [(folder / f"{split}.documents.npy").is_file() for split in SPLITS]
    return any(there) or all((folder / name).is_file() for name in (META, *(f"{split}.bin" for split in SPLITS)))


@dataclass(frozen=True)
class Store:
    """A corpus folder whose files are what its record says: but for `unread`, which is left to be compared."""

    folder: Path
    record: Record
    unread: list[Piece]

    def streams(self) -> tuple[TokenStream, TokenStream]:
        """Opens (training, held-out). Raises DataDamaged."""
        train, holdout = (self._stream(split) for split in SPLITS)
        return train, holdout

    def read(self) -> dict[str, str]:
        """Returns, by the path of each file, a hash of what was read of it."""
        left = {piece.path for piece in self.unread}
        files = {self.folder / name: facts.sha256 for name, facts in self.record.files.items()}
        return {
            str(path): "".join(hashes) if hashes and path not in left else file_fingerprint(path)
            for path, hashes in files.items()
        }

    @property
    def hashed(self) -> bool:
        """Whether the record of the folder has hashes."""
        return any(facts.sha256 for facts in self.record.files.values())

    def _stream(self, split: str) -> TokenStream:
        path = self.folder / f"{split}.documents.npy"
        try:
            documents = np.load(path, mmap_mode="r", allow_pickle=False)
            tokens = map_tokens(self.folder / f"{split}.bin", self.record.dtype)
            learned = (
                map_tokens(self.folder / name, "uint8")
                if (name := f"{split}.learned.bin") in self.record.files
                else None
            )
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise DataDamaged(f"{path} or what is beside it is damaged ({str(error).splitlines()[0]})") from None
        return TokenStream(tokens, documents, learned)


def open_store(folder: Path, record: Record | None = None) -> Store:
    """Opens a corpus folder, compared with its record, or with the one that is given. Raises DataDamaged."""
    record = record or read_record(folder)
    return Store(folder, record, check_folder(folder, record))


def require_there(mapped: np.ndarray) -> None:
    """Raises DataDamaged where the file behind a mapped array no longer reaches so far: to touch it would end the process."""
    while isinstance(mapped, np.memmap) and isinstance(mapped.base, np.memmap):
        mapped = mapped.base
    if not isinstance(mapped, np.memmap) or mapped.filename is None:
        return
    path = Path(mapped.filename)
    # One that is gone from its folder stays mapped.
    with contextlib.suppress(FileNotFoundError):
        if (size := path.stat().st_size) < mapped.offset + mapped.nbytes:
            raise DataDamaged(f"{path} has been cut short to {size:,} bytes while the run reads it")


def with_documents(tokens: np.ndarray, separator: int | None) -> TokenStream:
    """Returns the stream of bare tokens. A document ends with the token `separator`, where one is given."""
    if separator is None:
        return TokenStream(tokens, np.zeros(1, dtype=np.int64))
    window = 1 << 24  # a comparison of all at once would take a byte a token
    last = len(tokens) - 1  # the stream's own end begins no document
    starts = range(0, last, window)
    found = [s + np.flatnonzero(tokens[s : min(s + window, last)] == separator) for s in starts]
    ends = np.concatenate([np.empty(0, dtype=np.int64), *found])
    return TokenStream(tokens, np.concatenate(([0], ends + 1)))


def split_stream(stream: TokenStream, held: int, seq_len: int) -> tuple[TokenStream, TokenStream]:
    """Returns (train, held-out): the last `held` windows are held out."""
    cut_at = (stream.windows(seq_len) - held) * seq_len
    assert stream.learned is None, "a corpus of conversations has its own part that is held out"
    train = TokenStream(stream.tokens[: cut_at + 1], stream.documents[stream.documents <= cut_at])
    starts = stream.documents[stream.documents > cut_at] - cut_at
    return train, TokenStream(stream.tokens[cut_at:], np.concatenate(([0], starts)))


def map_tokens(path: Path, dtype: str, offset: int = 0) -> np.ndarray:
    """Maps the tokens behind `offset` bytes of a file; they are read when they are asked for."""
    # numpy cannot map nothing.
    here = path.stat().st_size > offset
    return np.memmap(path, dtype=dtype, mode="r", offset=offset) if here else np.empty(0, dtype=dtype)
