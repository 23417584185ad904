"""`data=...` -> the two corpora, training and held-out."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rowwise.trainer.data.chat.config import Chat
from rowwise.trainer.data.chat.corpus import packed_streams
from rowwise.trainer.data.chat.store import write_conversations
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer
from rowwise.trainer.data.config import DataConfig, Mixture, Source, Tokens
from rowwise.trainer.data.corpus import Corpus, Store
from rowwise.trainer.data.documents import Found
from rowwise.trainer.data.integrity import file_fingerprint
from rowwise.trainer.data.mixture import AnyCorpus, check_mixture, mixed
from rowwise.trainer.data.source import TextSource
from rowwise.trainer.data.store import cached_store
from rowwise.trainer.data.tokenizer import Tokenizer
from rowwise.trainer.data.tokens import open_folder, open_tokens, split_streams, token_files, token_range
from rowwise.trainer.data.watch import Watch, Watches
from rowwise.trainer.screen import count


@dataclass(frozen=True)
class Data:
    """What a run reads. `vocab_size`: the smallest that a model of it may have (0: not known). `tokenizer`: None
    where only tokens are known. `found`: the files it comes from. `tokens`: in all; `short`: of files of tokens, those
    that hold no whole sample. `read`: of each file that is mapped, a hash of what was read of it here, whatever is recorded;
    `watch` looks after them. `unhashed`: folders whose records have no hashes. `left_out`: characters that have no token. `told`:
    what else there is to say of it at the start. `parts`: the sources of a mixture, and what each reads."""

    train: AnyCorpus
    holdout: AnyCorpus
    vocab_size: int
    tokenizer: Tokenizer | None
    found: Found
    tokens: int
    read: dict[str, str]
    watch: Watch | Watches
    short: int = 0
    unhashed: tuple[Path, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    told: tuple[str, ...] = ()
    parts: tuple[tuple[Source, "Data"], ...] = ()


def open_data(config: DataConfig, seq_len: int, vocab_size: int) -> Data:
    """Opens, and where it must builds, the corpora. The same on every rank; whoever comes first builds.

    Raises ValueError for data that is missing, empty, of another kind than `config` reads, damaged, shorter than one
    sample, or has tokens beyond `vocab_size`.
    """
    if isinstance(config, Mixture):
        return _open_mixture(config, seq_len, vocab_size)
    if not 0 <= config.holdout < 1:
        raise ValueError(f"data.holdout={config.holdout}: a share from 0 to below 1")
    data = _open(config, seq_len)
    if data.vocab_size > vocab_size:
        raise ValueError(
            f"the tokens of data={config.name} go up to {data.vocab_size - 1}, but model.vocab_size={vocab_size}; "
            f"give model.vocab_size={data.vocab_size} or more, or another data.tokenizer"
        )
    if not data.train.samples:
        raise ValueError(_no_samples(config, data, seq_len))
    watch, corpora = data.watch, (data.train, data.holdout)
    assert isinstance(watch, Watch)
    train, holdout = (replace(one, watch=watch, vocab_size=vocab_size) for one in corpora if isinstance(one, Corpus))
    return replace(data, train=train, holdout=holdout)


def _open_mixture(config: Mixture, seq_len: int, vocab_size: int) -> Data:
    check_mixture(config)
    opened: dict[str, Data] = {}
    for part in config.sources:
        try:
            opened[part.called] = open_data(part.data, seq_len, vocab_size)
        except ValueError as error:
            raise ValueError(f"data.sources, {part.called}: {error}") from None
    parts = list(opened.values())
    tokenizers = [(label, data.tokenizer) for label, data in opened.items() if data.tokenizer is not None]
    for label, tokenizer in tokenizers[1:]:
        if _same_tokens(tokenizer, tokenizers[0][1]):
            continue
        raise ValueError(
            f"data.sources: {tokenizers[0][0]} and {label} have tokenizers that differ, so that a token does not mean the same in "
            "both; give each the same tokenizer"
        )
    train, holdout = mixed(config, [(data.train, data.holdout) for data in parts], seq_len)
    return Data(
        train,
        holdout,
        max(data.vocab_size for data in parts),
        _most_known([tokenizer for _, tokenizer in tokenizers]),
        sum((data.found for data in parts), Found()),
        sum(data.tokens for data in parts),
        {name: hash_ for data in parts for name, hash_ in data.read.items()},
        Watches([data.watch for data in parts]),
        parts=tuple((part.data, data) for part, data in zip(config.sources, parts, strict=True)),
    )


def _most_known(tokenizers: Sequence[Tokenizer]) -> Tokenizer | None:
    """Of several with the same tokens that of conversations, which knows their template too, or else the first."""
    return next((one for one in tokenizers if isinstance(one, ChatTokenizer)), next(iter(tokenizers), None))


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether they make the same tokens, whatever ends a document."""
    return one.fingerprint.partition("/")[0] == other.fingerprint.partition("/")[0]


def data_in_words(config: DataConfig, data: Data) -> str:
    """Returns the corpus of a run: its kind, tokens and files."""
    files = len(data.found.files)
    sources = f"{len(data.parts)} sources, " if data.parts else ""
    return f"{config.name}: {sources}{count(data.tokens)} tokens, {files:,} file{'s' * (files > 1)}"


def told_of_data(config: DataConfig, data: Data) -> list[str]:
    """Returns what is said of the data at the start of a run: what was passed over, left out or cannot be watched."""
    if isinstance(config, Mixture):
        pairs = zip(config.labels, data.parts, strict=True)
        return [f"{label}: {line}" for label, part in pairs for line in told_of_data(*part)]
    seq_len, files = data.train.seq_len, len(data.found.files)
    told = list(data.told)
    if count := data.found.passed_over.total():
        kinds = ", ".join(f"{number:,} {ending}" for ending, number in data.found.passed_over.most_common(5))
        told.append(
            f"{count:,} file{'s' * (count > 1)} passed over ({kinds}{', ...' * (len(data.found.passed_over) > 5)}): out of a "
            f"folder data={config.name} takes {', '.join(config.ENDINGS)}"
        )
    if data.short:
        told.append(
            f"{data.short:,} of {files:,} files hold less than batch.seq_len + 1 = {seq_len + 1} tokens: no sample"
        )
    told += [
        f"{folder} is of an earlier release, without hashes, and cannot be written: damage to it is not found"
        for folder in data.unhashed
    ]
    if count := data.left_out.total():
        most = ", ".join(f"{one!a} {number:,} times" for one, number in data.left_out.most_common(3))
        told.append(
            f"{count:,} characters of the text have no token and are left out ({most}{', ...' * (len(data.left_out) > 3)}); "
            "give data.tokenizer one with an unknown token, or with all bytes"
        )
    return told


def _no_samples(config: DataConfig, data: Data, seq_len: int) -> str:
    """Why there is nothing to train on."""
    if isinstance(config, Chat):
        return f"data=chat has no conversation to train on: {'; '.join(data.told)}; give more data, or a larger batch.seq_len"
    needed = f"one sample takes batch.seq_len + 1 = {seq_len + 1}"
    if data.holdout.samples or (isinstance(config, TextSource) and data.tokens > seq_len):
        return (
            f"data={config.name} has {data.tokens:,} tokens, and data.holdout={config.holdout} leaves {data.train.tokens:,} of "
            f"them to train on, where {needed}; give data.holdout=0 (with eval.every=0), more data or a smaller batch.seq_len"
        )
    each = f" in {data.short} files, none of which has a whole sample" if data.short > 1 else ""
    return (
        f"data={config.name} has {data.tokens:,} tokens{each}, and {needed}; give more data or a smaller batch.seq_len"
    )


def _open(config: Source, seq_len: int) -> Data:
    match config:
        case Tokens():
            return _open_tokens(config, seq_len)
        case Chat():
            return _open_chat(config, seq_len)
    return _open_text(config, seq_len)


def _open_chat(config: Chat, seq_len: int) -> Data:
    tokenizer, found = config.open_tokenizer(), config.find()
    store = cached_store(config, found.files, tokenizer, write_conversations)
    streams, told = packed_streams(config, store, found.files, seq_len)
    fingerprint = hashlib.sha256(f"{store.record.fingerprint}/{config.packing}/{config.too_long}".encode()).hexdigest()
    corpora = [Corpus((stream,), seq_len, config.mask_documents, fingerprint) for stream in streams]
    return replace(_of_store(corpora, tokenizer, found, store), told=told)


def _open_text(config: TextSource, seq_len: int) -> Data:
    tokenizer, found = config.open_tokenizer(), config.find()
    store = cached_store(config, found.files, tokenizer)
    fingerprint = store.record.fingerprint
    corpora = [Corpus((stream,), seq_len, config.mask_documents, fingerprint) for stream in store.streams()]
    return _of_store(corpora, tokenizer, found, store)


def _of_store(corpora: Sequence[Corpus], tokenizer: Tokenizer, found: Found, store: Store) -> Data:
    train, holdout = corpora
    watch = Watch([store.folder / name for name in store.record.files], store.unread, ours=True)
    tokens = train.tokens + holdout.tokens
    left_out = Counter(store.record.left_out)
    return Data(train, holdout, tokenizer.vocab_size, tokenizer, found, tokens, store.read(), watch, left_out=left_out)


def _open_tokens(config: Tokens, seq_len: int) -> Data:
    found, vocab_size = token_files(config), 0
    stores = [open_folder(path) for path in found.files if path.is_dir()]
    files = [path for path in found.files if not path.is_dir()]
    digest = hashlib.sha256(f"{config.dtype or 'uint16'}/{config.separator}/{config.holdout}".encode())
    for store in stores:
        vocab_size = max(vocab_size, store.record.vocab_size)
        digest.update(store.record.fingerprint.encode())
    streams = [open_tokens(path, config) for path in files]
    fingerprints = {str(path): file_fingerprint(path) for path in files}
    if config.mask_documents and config.separator is None:
        indices = [path.with_suffix(".idx") for path in files]
        fingerprints |= {str(path): file_fingerprint(path) for path in indices}
        digest.update("".join(fingerprints[str(path)] for path in indices).encode())
    for path, stream in zip(files, streams, strict=True):
        least, most = token_range(stream.tokens)
        if least < 0:
            raise ValueError(f"{path} holds the token {least}: tokens are at least 0; set data.dtype")
        vocab_size = max(vocab_size, most + 1)
        digest.update(fingerprints[str(path)].encode())
    if len(files) > 1:
        digest.update(b"held out of all files together")
    pairs = [store.streams() for store in stores]
    total = sum(len(stream.tokens) for stream in (*itertools.chain(*pairs), *streams))
    pairs += zip(*split_streams(streams, config.holdout, seq_len), strict=True)
    train, holdout = (
        Corpus(split, seq_len, config.mask_documents, digest.hexdigest()) for split in zip(*pairs, strict=True)
    )
    short = sum(stream.windows(seq_len) == 0 for stream in streams)
    read = {name: hash_ for store in stores for name, hash_ in store.read().items()} | fingerprints
    unread = [piece for store in stores for piece in store.unread]
    watch = Watch([Path(name) for name in read], unread, ours=False)
    unhashed = tuple(store.folder for store in stores if not store.hashed)
    return Data(train, holdout, vocab_size, None, found, total, read, watch, short, unhashed)
