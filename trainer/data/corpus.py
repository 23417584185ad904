"""A corpus: token files, memory-mapped, cut into samples of `seq_len` + 1 tokens.

A sample is a window of the packed stream; neighbouring windows share one token, so that every token but the first is
predicted once. Document boundaries are kept as offsets beside the tokens. On disk (what `store.py` writes):

    corpus/meta.json          dtype, vocab_size, fingerprint
    corpus/train.bin          tokens, raw            corpus/train.documents.npy     where each document starts
    corpus/holdout.bin        likewise
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

META = "meta.json"  # of a folder that is a corpus


@dataclass(frozen=True)
class TokenStream:
    """Packed tokens (n,) of any unsigned dtype, and the offsets at which documents start (ascending, from 0)."""

    tokens: np.ndarray
    documents: np.ndarray

    def windows(self, seq_len: int) -> int:
        """How many samples of `seq_len` the stream holds."""
        return max(0, (len(self.tokens) - 1) // seq_len)


@dataclass(frozen=True)
class Sample:
    """One window. `inputs`, `labels`, `positions` and `documents` are int64 (S,); a label that is not to be learned
    is IGNORE."""

    inputs: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray


IGNORE = -100


@dataclass(frozen=True)
class Corpus:
    """The samples of one split. `fingerprint` names the tokens and their order in the files."""

    streams: tuple[TokenStream, ...]
    seq_len: int
    mask_documents: bool
    fingerprint: str

    @property
    def samples(self) -> int:
        return sum(stream.windows(self.seq_len) for stream in self.streams)

    @property
    def tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self.streams)

    def sample(self, index: int) -> Sample:
        """Sample `index` of the corpus, in the order of the files."""
        for stream in self.streams:
            if index < (here := stream.windows(self.seq_len)):
                return cut(stream, index * self.seq_len, self.seq_len, self.mask_documents)
            index -= here
        raise IndexError(index)


def cut(stream: TokenStream, start: int, seq_len: int, mask_documents: bool) -> Sample:
    """The window at `start`. With `mask_documents`, positions restart at each document and the last token of a
    document is not asked to predict the first of the next."""
    tokens = stream.tokens[start : start + seq_len + 1].astype(np.int64)
    inputs, labels = tokens[:-1], tokens[1:].copy()
    places = np.arange(start, start + seq_len)
    if not mask_documents:
        return Sample(inputs, labels, places - start, np.zeros(seq_len, dtype=np.int64))
    owner = np.searchsorted(stream.documents, np.arange(start, start + seq_len + 1), side="right") - 1
    labels[owner[1:] != owner[:-1]] = IGNORE
    begins = np.maximum(stream.documents[owner[:-1]], start)
    return Sample(inputs, labels, places - begins, owner[:-1] - owner[0])


def is_corpus(folder: Path) -> bool:
    """Whether a folder is one that Rowwise wrote."""
    return all((folder / name).is_file() for name in (META, "train.bin", "train.documents.npy"))


def open_store(folder: Path, split: str) -> TokenStream:
    """The stream `split` (train or holdout) of a corpus folder."""
    meta = json.loads((folder / META).read_text())
    return TokenStream(map_tokens(folder / f"{split}.bin", meta["dtype"]), np.load(folder / f"{split}.documents.npy"))


def with_documents(tokens: np.ndarray, separator: int | None) -> TokenStream:
    """The stream of bare tokens. A document ends with the token `separator`, where one is given."""
    if separator is None:
        return TokenStream(tokens, np.zeros(1, dtype=np.int64))
    window = 1 << 24  # a comparison of all at once would take a byte a token
    last = len(tokens) - 1  # the stream's own end begins no document
    starts = range(0, last, window)
    found = [s + np.flatnonzero(tokens[s : min(s + window, last)] == separator) for s in starts]
    ends = np.concatenate([np.empty(0, dtype=np.int64), *found])
    return TokenStream(tokens, np.concatenate(([0], ends + 1)))


def split_stream(stream: TokenStream, held: int, seq_len: int) -> tuple[TokenStream, TokenStream]:
    """(train, held-out): the last `held` windows are held out."""
    cut_at = (stream.windows(seq_len) - held) * seq_len
    train = TokenStream(stream.tokens[: cut_at + 1], stream.documents[stream.documents <= cut_at])
    starts = stream.documents[stream.documents > cut_at] - cut_at
    return train, TokenStream(stream.tokens[cut_at:], np.concatenate(([0], starts)))


def map_tokens(path: Path, dtype: str, offset: int = 0) -> np.ndarray:
    """Maps the tokens behind `offset` bytes of a file; they are read when they are asked for."""
    # numpy cannot map nothing.
    here = path.stat().st_size > offset
    return np.memmap(path, dtype=dtype, mode="r", offset=offset) if here else np.empty(0, dtype=dtype)
