"""`data=...` -> the two corpora, training and held-out."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rowwise.trainer.data.config import DataConfig, Stdlib, Tokens
from rowwise.trainer.data.corpus import Corpus, TokenStream, open_raw, open_store, split_stream
from rowwise.trainer.data.documents import find_files
from rowwise.trainer.data.store import cached_store
from rowwise.trainer.data.tokenizer import Tokenizer, open_tokenizer


@dataclass(frozen=True)
class Data:
    """What a run reads. `vocab_size`: the smallest that a model of it may have (0: not known). `tokenizer`: None
    where only tokens are known."""

    train: Corpus
    holdout: Corpus
    vocab_size: int
    tokenizer: Tokenizer | None


def open_data(config: DataConfig, seq_len: int, vocab_size: int) -> Data:
    """Opens, and where it must builds, the corpora. The same on every rank; whoever comes first builds.

    Raises ValueError for data that is missing, empty, shorter than one sample, or has tokens beyond `vocab_size`.
    """
    if not 0 <= config.holdout < 1:
        raise ValueError(f"data.holdout={config.holdout}: a share from 0 to below 1")
    data = _open_tokens(config, seq_len) if isinstance(config, Tokens) else _open_text(config, seq_len)
    if data.vocab_size > vocab_size:
        raise ValueError(
            f"the tokens of data={config.name} go up to {data.vocab_size - 1}, but model.vocab_size={vocab_size}; "
            f"give model.vocab_size={data.vocab_size} or more, or another data.tokenizer"
        )
    if not data.train.samples:
        raise ValueError(
            f"data={config.name} has {data.train.tokens} tokens to train on, and one sample takes batch.seq_len + 1 = "
            f"{seq_len + 1}; give more data or a smaller batch.seq_len"
        )
    return data


def _open_text(config, seq_len: int) -> Data:
    tokenizer = (
        open_tokenizer("bytes") if isinstance(config, Stdlib) else open_tokenizer(config.tokenizer, config.end_of_text)
    )
    folder = cached_store(config, tokenizer)
    fingerprint = json.loads((folder / "meta.json").read_text())["fingerprint"]
    train, holdout = (
        Corpus((open_store(folder, split),), seq_len, config.mask_documents, fingerprint)
        for split in ("train", "holdout")
    )
    return Data(train, holdout, tokenizer.vocab_size, tokenizer)


def _open_tokens(config: Tokens, seq_len: int) -> Data:
    trains, holdouts, vocab_size = [], [], 0
    digest = hashlib.sha256(f"{config.dtype}/{config.separator}/{config.holdout}".encode())
    for path in _token_files(config):
        if path.is_dir():
            meta = json.loads((path / "meta.json").read_text())
            train, holdout = open_store(path, "train"), open_store(path, "holdout")
            vocab_size = max(vocab_size, meta["vocab_size"])
            digest.update(meta["fingerprint"].encode())
        else:
            stream = _open_raw_checked(path, config)
            least, most = _token_range(stream)
            if least < 0:
                raise ValueError(f"{path} holds the token {least}: tokens are at least 0; set data.dtype")
            vocab_size = max(vocab_size, most + 1)
            digest.update(_fingerprint(path).encode())
            train, holdout = split_stream(stream, config.holdout, seq_len)
        trains.append(train)
        holdouts.append(holdout)
    fingerprint = digest.hexdigest()
    return Data(
        Corpus(tuple(trains), seq_len, config.mask_documents, fingerprint),
        Corpus(tuple(holdouts), seq_len, config.mask_documents, fingerprint),
        vocab_size,
        None,
    )


def _token_files(config: Tokens) -> list[Path]:
    files = [config.files] if isinstance(config.files, str) else config.files
    folders = [Path(f).expanduser() for f in files]
    if folders and all((folder / "meta.json").is_file() for folder in folders):
        return folders
    return find_files(config.files, (".bin",))


def _open_raw_checked(path: Path, config: Tokens) -> TokenStream:
    size, width = path.stat().st_size, {"uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "int64": 8}[config.dtype]
    if size == 0 or size % width:
        raise ValueError(
            f"{path} has {size} bytes, which is no number of {config.dtype} tokens above 0; set data.dtype"
        )
    if config.mask_documents and config.separator is None:
        raise ValueError(
            "data.mask_documents=true needs data.separator, the token that ends a document in a raw token file"
        )
    return open_raw(path, config.dtype, config.separator)


def _token_range(stream: TokenStream, window: int = 1 << 24) -> tuple[int, int]:
    """The smallest and the largest token: of the whole file up to 64 windows, else of 64 windows spread over it, so that a file of
    terabytes opens at once."""
    n = len(stream.tokens)
    starts = range(0, n, window) if n <= 64 * window else range(0, n - window, (n - window) // 63)
    windows = [stream.tokens[s : s + window] for s in starts]
    return min(int(w.min()) for w in windows), max(int(w.max()) for w in windows)


def _fingerprint(path: Path, window: int = 1 << 20) -> str:
    """SHA-256 of the size and of 64 windows spread over the file (of all of a small one)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, max(window, size // 64)):
            file.seek(start)
            digest.update(file.read(window))
    return digest.hexdigest()
