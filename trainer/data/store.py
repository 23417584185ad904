"""Documents -> a corpus folder on disk, once: later runs, and every other rank of this machine, map what is there.

A document is held out as a whole, by a hash of its bytes, so that no text stands in both splits and adding files
moves none. A long one (a corpus in a single file, say) holds out its own end instead.
"""

import hashlib
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_dir

from rowwise.trainer.data.corpus import Store, open_store
from rowwise.trainer.data.integrity import (
    END_OF_DOCUMENT,
    SPLITS,
    Contents,
    DataDamaged,
    HashedFile,
    Record,
    write_record,
)
from rowwise.trainer.data.pieces import PIECE_BYTES, Document, Piece, pieces
from rowwise.trainer.data.source import TextSource
from rowwise.trainer.data.tokenizer import Tokenizer
from rowwise.trainer.files import writing

_BATCH, _BATCH_BYTES = 256, 1 << 20  # that are tokenized at a time
_SAY_SECONDS = 5.0
_FORMAT = 5


def cached_store(
    config: TextSource, files: Sequence[Path], tokenizer: Tokenizer, write: "Write | None" = None
) -> Store:
    """Returns the corpus of a source's files: built now by `write` (None: `write_texts`), or found in the cache; one that is found
    damaged is made anew, and said to be. Raises ValueError for empty data, and for files of another kind than the source reads."""
    root = Path(config.cache_dir or user_cache_dir("rowwise")).expanduser()
    folder = root / _cache_key(config, files, tokenizer)
    if (store := _found(folder)) is not None:
        return store
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise ValueError(f"data.cache_dir={root}: cannot be written ({error.strerror}); give another folder") from None
    try:
        if (store := _found(folder, aloud=True)) is None:
            _build(folder, config, files, tokenizer, write or write_texts)
            store = open_store(folder)
    finally:
        lock.release()
    return store


def _found(folder: Path, aloud: bool = False) -> Store | None:
    """What is in the cache, where that is whole. `aloud`: says why it is not used."""
    if not folder.exists():
        return None
    try:
        return open_store(folder)
    except DataDamaged as damage:
        if aloud:
            print(f"{damage}; the cache {folder} is made anew", file=sys.stderr, flush=True)
        return None


def _cache_key(config: TextSource, files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Changes when a file is added, removed, resized or touched, or when it would be read in another way."""
    digest = hashlib.sha256(f"{_FORMAT} {config.holdout} {config.reading()} {tokenizer.fingerprint}".encode())
    for path in files:
        facts = path.stat()
        digest.update(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return f"{config.name}-{digest.hexdigest()[:24]}"


def _build(folder: Path, config: TextSource, files: Sequence[Path], tokenizer: Tokenizer, write: "Write") -> None:
    for file in files:
        config.check(file)
    partial = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(folder):
            total = sum(file.stat().st_size for file in files) if config.AS_LARGE else None
            write(partial, config, files, tokenizer, Progress(f"data={config.name}", total))
        if folder.name != _cache_key(config, files, tokenizer):
            raise ValueError(
                f"data={config.name}: files changed while they were read; start again once they stay as they are"
            )
        # Whoever has the old one mapped keeps it.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Progress:
    """Says every few seconds, on stderr, how much text was read: of `total` bytes, where that is known."""

    def __init__(self, what: str, total: int | None):
        self._what, self._total = what, total
        self._began = self._said = time.monotonic()
        self._read = 0

    def add(self, size: int) -> None:
        self._read += size
        now = time.monotonic()
        if now - self._said < _SAY_SECONDS:
            return
        self._said = now
        of, seconds = f" of {self._total / 1e6:,.0f}" if self._total else "", now - self._began
        print(
            f"{self._what}: {self._read / 1e6:,.0f}{of} MB of text tokenized in {seconds:,.0f} s, "
            f"{self._read / 1e6 / seconds:,.1f} MB/s",
            file=sys.stderr,
            flush=True,
        )


Tokens = Sequence[int] | np.ndarray | bytes  # of a piece
Encoded = Callable[[Iterable[list[Piece]]], Iterator[tuple[list[Piece], Sequence[Tokens]]]]
Write = Callable[[Path, TextSource, Sequence[Path], Tokenizer, Progress], None]


def write_texts(
    folder: Path,
    config: TextSource,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    progress: Progress,
    encoded: "Encoded | None" = None,
) -> None:
    """Writes the documents of a source's files as a corpus folder. `encoded`: as of `write_store`. Raises ValueError."""
    documents = itertools.chain.from_iterable(config.documents(file, folder) for file in files)
    write_store(folder, documents, tokenizer, config.holdout, progress, encoded)


def write_store(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    holdout: float,
    progress: Progress | None = None,
    encoded: "Encoded | None" = None,
) -> None:
    """Writes a corpus folder (see `corpus.py`). `encoded`: makes tokens of batches of pieces, in their order; None: `tokenizer`, here.
    Raises ValueError where there is no text."""
    dtype = dtype_of(tokenizer.vocab_size)
    splits = {split: Split(folder, split, dtype) for split in SPLITS}
    batches = _batches(itertools.chain.from_iterable(pieces(document, holdout) for document in documents))
    here = ((batch, encode(tokenizer, batch)) for batch in batches)
    for batch, each in here if encoded is None else encoded(batches):
        for piece, tokens in zip(batch, each, strict=True):
            splits[piece.split].add(tokens, tokenizer.end if piece.last else None)
        if progress is not None:
            progress.add(sum(len(piece.text) for piece in batch))
    if not splits["train"].tokens:
        raise ValueError(
            "the data holds no text to train on: every document is empty or held out; give other data.files"
        )
    files = {name: facts for split in splits.values() for name, facts in split.close().items()}
    hashes = "".join(split.content.hexdigest() for split in splits.values())
    lengths = {name: split.tokens for name, split in splits.items()}
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
    write_record(
        folder, Record(dtype.name, tokenizer.vocab_size, fingerprint, lengths, files, dict(tokenizer.left_out))
    )


def dtype_of(vocab_size: int) -> np.dtype:
    """Returns the narrowest dtype that a corpus folder keeps tokens of so large a vocabulary in."""
    return np.dtype("uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32")


class Split:
    """The files of one split, as they are written. `content`: a hash of the tokens and of where documents end."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.tokens, self.content = 0, hashlib.sha256()
        self._folder, self._name, self._dtype = folder, name, dtype
        self._file = HashedFile(folder / f"{name}.bin")
        self._starts, self._count, self._in_document = (folder / f"{name}.starts").open("w+b"), 0, False

    def add(self, tokens: "Tokens", end: list[int] | None) -> None:
        """Tokens of a piece of a document, and at its end what ends it; None: it goes on."""
        parts = (tokens, end or [])
        whole = b"".join(p if isinstance(p, bytes) else np.asarray(p, self._dtype).tobytes() for p in parts)
        if whole and not self._in_document:
            self._starts.write(self.tokens.to_bytes(8, "little"))
            self._count, self._in_document = self._count + 1, True
        self._file.write(whole)
        self.content.update(whole)
        self.tokens += len(whole) // self._dtype.itemsize
        if end is not None and self._in_document:
            self.content.update(END_OF_DOCUMENT)
            self._in_document = False

    def close(self) -> dict[str, Contents]:
        """Returns what was written, by the name of the file."""
        name = f"{self._name}.documents.npy"
        file = HashedFile(self._folder / name)
        if not self._count:
            self._starts.write(bytes(8))
        count = max(1, self._count)
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        self._starts.seek(0)
        while block := self._starts.read(PIECE_BYTES):
            file.write(block)
        self._starts.close()
        Path(self._starts.name).unlink()
        return {f"{self._name}.bin": self._file.close(), name: file.close()}


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces together, as many as are tokenized at once."""
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, batch: list[Piece]) -> list[list[int]] | list[bytes]:
    """Returns the tokens of each piece. Raises ValueError, which names the file and the line, for what is not UTF-8."""
    try:
        return tokenizer.encode([piece.text for piece in batch])
    except UnicodeDecodeError:
        for piece in batch:
            piece.require_utf8()
        raise
