"""The samples of conversations: whole ones side by side, which do not see each other.

A conversation of n tokens takes n - 1 places: its last token is only predicted. What is left of a sample has no label.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rowwise.trainer.data.chat.config import Chat
from rowwise.trainer.data.chat.packing import Packed, pack
from rowwise.trainer.data.chat.rows import place_of
from rowwise.trainer.data.chat.store import LEARNED, SKIPPED
from rowwise.trainer.data.corpus import IGNORE, Sample, Store, TokenStream


@dataclass(frozen=True)
class Conversations:
    """Those of `stream`, of which `lengths` tokens each are used, `packed` for samples of `seq_len`."""

    stream: TokenStream
    lengths: np.ndarray
    packed: Packed
    seq_len: int

    @property
    def tokens(self) -> np.ndarray:
        return self.stream.tokens

    def windows(self, seq_len: int) -> int:
        assert seq_len == self.seq_len
        return len(self.packed)

    def sample(self, index: int, seq_len: int, mask_documents: bool) -> Sample:
        assert mask_documents and self.stream.learned is not None
        self.stream.require_there()
        inputs, labels = np.zeros(seq_len, dtype=np.int64), np.full(seq_len, IGNORE)
        positions, documents = np.empty(seq_len, dtype=np.int64), np.empty(seq_len, dtype=np.int64)
        at, members = 0, self.packed[index]
        for document, member in enumerate(members.tolist()):
            start, places = int(self.stream.documents[member]), int(self.lengths[member]) - 1
            here = slice(at, at := at + places)
            tokens = self.stream.tokens[start : start + places + 1].astype(np.int64)
            inputs[here] = tokens[:-1]
            labels[here] = np.where(self.stream.learned[start + 1 : start + places + 1], tokens[1:], IGNORE)
            positions[here], documents[here] = np.arange(places), document
        positions[at:], documents[at:] = np.arange(seq_len - at), len(members)
        return Sample(inputs, labels, positions, documents)


def packed_streams(
    config: Chat, store: Store, files: tuple[Path, ...], seq_len: int
) -> tuple[tuple[Conversations, Conversations], tuple[str, ...]]:
    """Returns (training, held-out) packed for samples of `seq_len`, and what there is to say of them. Raises ValueError for a
    conversation that is too long and is to be refused."""
    several, cut, skipped = [], 0, 0
    for split, stream in zip(("train", "holdout"), store.streams(), strict=True):
        lengths = np.diff(stream.documents, append=len(stream.tokens))
        long = np.flatnonzero(lengths > seq_len + 1)
        if len(long) and config.too_long == "refuse":
            origins = np.load(store.folder / f"{split}.origins.npy", mmap_mode="r", allow_pickle=False)
            file, number = origins[long[0]].tolist()
            raise ValueError(
                f"{place_of(files[file], number)}: a conversation of {lengths[long[0]]:,} tokens, of {len(long):,} that have more "
                f"than batch.seq_len + 1 = {seq_len + 1:,}; give data.too_long=cut or skip, or a larger batch.seq_len"
            )
        used = (
            np.minimum(lengths, seq_len + 1)
            if config.too_long == "cut"
            else np.where(lengths > seq_len + 1, 0, lengths)
        )
        assert stream.learned is not None
        for member in long.tolist() if config.too_long == "cut" else ():
            start = int(stream.documents[member])
            if not stream.learned[start + 1 : start + seq_len + 1].any():
                used[member] = 0  # nothing is left to learn
        cut, skipped = cut + int((used[long] > 0).sum()), skipped + int((used[long] == 0).sum())
        there = np.flatnonzero(used > 1)
        packed = pack(used[there] - 1, seq_len, config.packing)
        several.append(Conversations(stream, used, Packed(packed.begins, there[packed.members]), seq_len))
    train, holdout = several
    return (train, holdout), tuple(_told(store, train, cut, skipped))


def _told(store: Store, train: Conversations, cut: int, skipped: int) -> list[str]:
    found = store.record.found
    forms = [
        f"{number:,} of {what}" for what, number in found.items() if not what.startswith((SKIPPED, "first ", LEARNED))
    ]
    tokens = sum(store.record.tokens.values())
    places = len(train.packed) * train.seq_len
    full = int((train.lengths[train.packed.members] - 1).sum()) / max(1, places)
    told = [
        f"conversations: {', '.join(forms)}; {found.get(LEARNED, 0) / max(1, tokens):.1%} of their tokens are learned; "
        f"{len(train.packed.members):,} to train on in {len(train.packed):,} samples, which are {full:.1%} full"
    ]
    firsts = dict(what.removeprefix("first ").split("\n", 1) for what in found if what.startswith("first "))
    told += [
        f"{number:,} row{'s' * (number > 1)} {what} (the first: {firsts[what]})"
        for what, number in found.items()
        if what.startswith(SKIPPED)
    ]
    if cut or skipped:
        told.append(
            f"{cut + skipped:,} conversations have more than batch.seq_len + 1 = {train.seq_len + 1:,} tokens: {cut:,} are cut, "
            f"{skipped:,} skipped"
        )
    return told
