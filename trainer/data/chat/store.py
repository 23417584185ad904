"""Conversations -> a corpus folder: their tokens, which of them are learned, and where each conversation comes from."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rowwise.trainer.data.chat.config import Chat
from rowwise.trainer.data.chat.forms import BadRow, Conversation, conversation_of
from rowwise.trainer.data.chat.renderer import Renderer, Said
from rowwise.trainer.data.chat.rows import place_of, rows_of
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer
from rowwise.trainer.data.integrity import SPLITS, Contents, HashedFile, Record, write_record
from rowwise.trainer.data.pieces import Document, is_held_out
from rowwise.trainer.data.source import TextSource
from rowwise.trainer.data.store import Progress, Split, dtype_of
from rowwise.trainer.data.tokenizer import Tokenizer

_BATCH = 64  # conversations that are rendered and tokenized at a time
LEARNED, SKIPPED, ASTRIDE = "tokens that are learned", "skipped: ", "tokens that reach out of what is said"


@dataclass(frozen=True)
class Found:
    """A row of a file, by the numbers of both, and its conversation or why it is none."""

    file: int
    number: int
    conversation: Conversation | BadRow


@dataclass(frozen=True)
class Tokens:
    """A conversation as tokens; of each, whether it is learned."""

    found: Found
    text: str
    ids: list[int]
    learned: np.ndarray


def write_conversations(
    folder: Path, config: TextSource, files: Sequence[Path], tokenizer: Tokenizer, progress: Progress
) -> None:
    """Writes the conversations of `files` as a corpus folder. Raises ValueError, with file and line, for a row that is none and is not
    to be skipped, and where nothing is left to learn from."""
    assert isinstance(config, Chat) and isinstance(tokenizer, ChatTokenizer)
    dtype, counts = dtype_of(tokenizer.vocab_size), Counter[str]()
    splits = {split: _Conversations(folder, split, dtype) for split in SPLITS}
    with Renderer(tokenizer.template) as renderer:
        for batch in _batches(files):
            for one in _tokens(batch, renderer, tokenizer):
                if isinstance(one, tuple):
                    _pass_over(config, files, *one, counts)
                    continue
                assert isinstance(one.found.conversation, Conversation)
                counts[one.found.conversation.form] += 1
                counts[LEARNED] += int(one.learned[1:].sum())
                held_out = config.holdout and is_held_out(Document("", one.text.encode()), config.holdout)
                splits["holdout" if held_out else "train"].add(one)
                progress.add(len(one.text))
    if not splits["train"].split.tokens:
        raise ValueError(
            "the data holds no conversation to train on: every one is skipped or held out; give other data.files, or see "
            f"data.holdout{_skips(counts)}"
        )
    written = {name: facts for split in splits.values() for name, facts in split.close().items()}
    hashes = "".join(split.split.content.hexdigest() for split in splits.values())
    lengths = {name: split.split.tokens for name, split in splits.items()}
    fingerprint, left_out = hashlib.sha256(hashes.encode()).hexdigest(), dict(tokenizer.left_out)
    write_record(
        folder, Record(dtype.name, tokenizer.vocab_size, fingerprint, lengths, written, left_out, dict(counts))
    )


def _batches(files: Sequence[Path]) -> Iterator[list[Found]]:
    batch: list[Found] = []
    for file, path in enumerate(files):
        for row in rows_of(path):
            try:
                found: Conversation | BadRow = (
                    row.value if isinstance(row.value, BadRow) else conversation_of(row.value)
                )
            except BadRow as bad:
                found = bad
            batch.append(Found(file, row.number, found))
            if len(batch) == _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _tokens(
    batch: Sequence[Found], renderer: Renderer, tokenizer: ChatTokenizer
) -> Iterator[Tokens | tuple[Found, BadRow]]:
    """Each conversation as tokens, or why it is none that can be learned, in order."""
    rendered = iter(
        renderer.conversations([one.conversation for one in batch if isinstance(one.conversation, Conversation)])
    )
    said = [one.conversation if isinstance(one.conversation, BadRow) else _whole(next(rendered)) for one in batch]
    texts = [one for one in said if isinstance(one, Said)]
    encoded = iter(tokenizer.encode_learned([one.text for one in texts], [one.spans for one in texts]))
    for found, one in zip(batch, said, strict=True):
        if isinstance(one, BadRow):
            yield found, one
            continue
        ids, learned = next(encoded)
        if learned.all():
            yield found, BadRow("all of it would be learned", "the template marks it all as generated")
        elif not learned[1:].any():
            yield found, BadRow("nothing in it is learned", "what the assistant says has no token")
        else:
            yield Tokens(found, one.text, ids, learned)


def _whole(said: Said | BadRow) -> Said | BadRow:
    """Refuses what is no text: half of a character of 32 bits, as JSON may spell it."""
    if isinstance(said, Said):
        try:
            said.text.encode()
        except UnicodeEncodeError:
            return BadRow("half of a surrogate pair, which is no character")
    return said


def _pass_over(config: Chat, files: Sequence[Path], found: Found, bad: BadRow, counts: Counter[str]) -> None:
    """Counts a row that is to be skipped. Raises ValueError where it is to be refused."""
    place = place_of(files[found.file], found.number)
    if config.bad_rows == "refuse":
        raise ValueError(f"{place}: {bad}; mend it, or give data.bad_rows=skip to pass over such rows and count them")
    if not counts[SKIPPED + bad.reason]:
        counts[f"first {SKIPPED}{bad.reason}\n{place}: {bad}"] = 1
    counts[SKIPPED + bad.reason] += 1


def _skips(counts: Counter[str]) -> str:
    told = [f"{number:,} {what}" for what, number in counts.items() if what.startswith(SKIPPED)]
    return f" ({'; '.join(told)})" if told else ""


class _Conversations:
    """The files of one split, as they are written."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.split = Split(folder, name, dtype)
        self._folder, self._name = folder, name
        self._learned, self._origins = HashedFile(folder / f"{name}.learned.bin"), list[tuple[int, int]]()

    def add(self, one: Tokens) -> None:
        self.split.add(one.ids, [])
        self._learned.write(one.learned.tobytes())
        self.split.content.update(one.learned.tobytes())
        self._origins.append((one.found.file, one.found.number))

    def close(self) -> dict[str, Contents]:
        """Returns what was written, by the name of the file."""
        name = f"{self._name}.origins.npy"
        file = HashedFile(self._folder / name)
        np.lib.format.write_array(file, np.array(self._origins, dtype="<i8").reshape(-1, 2))
        return {**self.split.close(), f"{self._name}.learned.bin": self._learned.close(), name: file.close()}
