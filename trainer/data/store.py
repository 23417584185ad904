"""Documents -> a corpus folder on disk, once: later runs, and every other rank of this machine, map what is there.

A document is held out as a whole, by a hash of its bytes, so that no text stands in both splits and adding files
moves none. A long one (a corpus in a single file, say) holds out its own end instead.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_dir

from rowwise.trainer.data.config import Hf, Stdlib, Text
from rowwise.trainer.data.corpus import META
from rowwise.trainer.data.documents import check_files, read_documents
from rowwise.trainer.data.tokenizer import Tokenizer
from rowwise.trainer.files import writing

_BATCH = 256  # documents tokenized at a time
_FORMAT = 3
_LONG = 256 << 10  # bytes


def cached_store(config: Stdlib | Text | Hf, files: Sequence[Path], tokenizer: Tokenizer) -> Path:
    """The corpus folder of a source's files: built now, or found in the cache. Raises ValueError for empty data, and for
    files of another kind than the source reads."""
    root = Path(config.cache_dir or user_cache_dir("rowwise")).expanduser()
    folder = root / _cache_key(config, files, tokenizer)
    if not (folder / META).exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock")
            lock.acquire()
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={root}: cannot be written ({error.strerror}); give another folder"
            ) from None
        try:
            if not (folder / META).exists():
                _build(folder, config, files, tokenizer)
        finally:
            lock.release()
    return folder


def _cache_key(config: Stdlib | Text | Hf, files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Changes when a file is added, removed, resized or touched, or when it would be read in another way."""
    digest = hashlib.sha256(
        f"{_FORMAT} {config.holdout} {getattr(config, 'column', '')} {tokenizer.fingerprint}".encode()
    )
    for path in files:
        facts = path.stat()
        digest.update(f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return f"{config.name}-{digest.hexdigest()[:24]}"


def _build(folder: Path, config: Stdlib | Text | Hf, files: Sequence[Path], tokenizer: Tokenizer) -> None:
    check_files(files, config)
    partial = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(folder):
            write_store(
                partial,
                itertools.chain.from_iterable(read_documents(f, config) for f in files),
                tokenizer,
                config.holdout,
            )
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_store(folder: Path, documents: Iterator[bytes], tokenizer: Tokenizer, holdout: float) -> None:
    """Writes a corpus folder (see `corpus.py`). Raises ValueError where there is no text."""
    pieces = itertools.chain.from_iterable(split_document(document, holdout) for document in documents)
    dtype = np.dtype(
        "uint8" if tokenizer.vocab_size <= 1 << 8 else "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    )
    starts: dict[str, list[int]] = {"train": [], "holdout": []}
    lengths = dict.fromkeys(starts, 0)
    content = {split: hashlib.sha256() for split in starts}
    files = {split: (folder / f"{split}.bin").open("wb") for split in starts}
    try:
        while batch := list(itertools.islice(pieces, _BATCH)):
            tokenized = tokenizer.encode([document for _, document in batch])
            for (split, _), tokens in zip(batch, tokenized, strict=True):
                data = (
                    np.frombuffer(tokens, dtype=dtype) if isinstance(tokens, bytes) else np.asarray(tokens, dtype=dtype)
                )
                if len(data):
                    starts[split].append(lengths[split])
                    lengths[split] += len(data)
                    content[split].update(data.tobytes() + b"\0end of document\0")
                    files[split].write(data.data)
    finally:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    if not lengths["train"]:
        raise ValueError(
            "the data holds no text to train on: every document is empty or held out; give other data.files"
        )
    for split, offsets in starts.items():
        np.save(folder / f"{split}.documents.npy", np.asarray(offsets or [0], dtype=np.int64))
    fingerprint = hashlib.sha256("".join(c.hexdigest() for c in content.values()).encode()).hexdigest()
    meta = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "fingerprint": fingerprint, "tokens": lengths}
    with (folder / META).open("w") as meta_file:
        json.dump(meta, meta_file, indent=1)
        meta_file.flush()
        os.fsync(meta_file.fileno())


def split_document(document: bytes, holdout: float) -> Iterator[tuple[str, bytes]]:
    """(split, text) of a document: of one split, or of a long one its beginning and its end, cut between two lines."""
    if len(document) < _LONG or holdout == 0:
        yield ("holdout" if is_held_out(document, holdout) else "train"), document
        return
    end = round(len(document) * (1 - holdout))
    cut = document.rfind(b"\n", 0, end) + 1 or end
    yield "train", document[:cut]
    yield "holdout", document[cut:]


def is_held_out(document: bytes, share: float) -> bool:
    """A hash of the bytes below `share`."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest()) < share * 2**64
