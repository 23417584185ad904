"""Text to tokens in many processes, in bounded memory: the folder that one process would write, byte for byte.

This process reads documents, cuts them and writes tokens; workers, each with a tokenizer of its own, make tokens of a batch of
about a megabyte, in the bytes that the folder has of them. Batches come back in their order, and at most two a worker are under way.
"""

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from rowwise.trainer.data.documents import Found
from rowwise.trainer.data.integrity import Record, read_record
from rowwise.trainer.data.pieces import Piece
from rowwise.trainer.data.source import TextSource
from rowwise.trainer.data.store import Progress, Tokens, dtype_of, encode, write_texts
from rowwise.trainer.data.tokenizer import Tokenizer

AHEAD = 2  # batches a worker

Made = tuple[list[np.ndarray | bytes], Counter[str]]
_own: list[Tokenizer] = []  # of a worker


def write_tokens(config: TextSource, found: Found, folder: Path, workers: int, what: str) -> Record:
    """Writes the tokens of a source's files into the empty `folder`, and returns what it holds. `what`: as progress calls it. Raises
    ValueError for what is no text, and where a worker was ended."""
    for file in found.files:
        config.check(file)
    facts, tokenizer = _facts(found), config.open_tokenizer()
    progress = Progress(what, found.bytes if config.AS_LARGE else None)
    if workers < 2:
        write_texts(folder, config, found.files, tokenizer, progress)
    else:
        with Encoders(config, workers, tokenizer) as encoders:
            write_texts(folder, config, found.files, tokenizer, progress, encoders.encoded)
    if _facts(found) != facts:
        raise ValueError(f"{what}: files changed while they were read; start again once they stay as they are")
    return read_record(folder)


class Encoders:
    """Worker processes that make tokens. As a context, it ends them. What they leave out of the text is counted by `tokenizer`."""

    def __init__(self, config: TextSource, workers: int, tokenizer: Tokenizer):
        context = multiprocessing.get_context("spawn")  # a fork would take along threads of the tokenizer that is here
        self._pool = ProcessPoolExecutor(workers, context, _begin, (config,))
        self._ahead, self._tokenizer = AHEAD * workers, tokenizer

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encoded(self, batches: Iterable[list[Piece]]) -> Iterator[tuple[list[Piece], Sequence[Tokens]]]:
        """Yields batches and their tokens, in order. Raises ValueError."""
        waiting: deque[tuple[list[Piece], Future[Made]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, self._pool.submit(_make, [piece.text for piece in batch])))
                if len(waiting) > self._ahead:
                    yield self._made(*waiting.popleft())
            while waiting:
                yield self._made(*waiting.popleft())
        except BrokenProcessPool:
            raise ValueError(
                "a worker was ended from outside, perhaps for want of memory; give a smaller nproc, or look at the system's log"
            ) from None

    def _made(self, batch: list[Piece], future: Future[Made]) -> tuple[list[Piece], Sequence[Tokens]]:
        try:
            tokens, left_out = future.result()
        except UnicodeDecodeError:
            return batch, encode(self._tokenizer, batch)  # says where
        self._tokenizer.left_out.update(left_out)
        return batch, tokens


def _begin(config: TextSource) -> None:
    _own.append(config.open_tokenizer())


def _make(texts: list[bytes]) -> Made:
    """Makes tokens in a worker."""
    tokenizer = _own[0]
    tokenizer.left_out.clear()
    dtype = dtype_of(tokenizer.vocab_size)
    made = [tokens if isinstance(tokens, bytes) else np.asarray(tokens, dtype) for tokens in tokenizer.encode(texts)]
    return made, Counter(tokenizer.left_out)


def _facts(found: Found) -> list[tuple[int, int]]:
    """What changes with a file."""
    return [(facts.st_size, facts.st_mtime_ns) for facts in (path.stat() for path in found.files)]
