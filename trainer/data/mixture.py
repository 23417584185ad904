"""A mixture: the corpora of several sources as one, in the order of `mixing.py`.

Sample k of the order is of some source, and the n-th of it that the run reads: sample n of that source's own order, as it would be
by itself. Each keeps its documents, its held-out part and what looks after its files.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from rowwise.optim.lengths import read_length
from rowwise.trainer.data.config import Change, Mixture, Part
from rowwise.trainer.data.corpus import Corpus, Sample
from rowwise.trainer.data.mixing import Dealing, counts, deal, shares_of

RAMP = 64  # at most so many steps in a gradual change


@dataclass(frozen=True)
class MixedCorpus:
    """The samples of one split of several corpora, one after another; `drawn` says in which order a run reads them.
    `fingerprint` names what all read, and the order."""

    corpora: tuple["AnyCorpus", ...]
    labels: tuple[str, ...]
    dealing: Dealing
    fingerprint: str

    @property
    def seq_len(self) -> int:
        return self.corpora[0].seq_len

    @property
    def mask_documents(self) -> bool:
        """Whether attention stops at documents anywhere: a sample of a source where it does not is one document."""
        return any(corpus.mask_documents for corpus in self.corpora)

    @property
    def samples(self) -> int:
        return self._starts[-1]

    @property
    def tokens(self) -> int:
        return sum(corpus.tokens for corpus in self.corpora)

    def drawn(self, first: int, count: int, key: str) -> np.ndarray:
        """Returns the indices (n,) of the samples number `first`, ... of the order that `key` names. Raises ValueError beyond its
        end."""
        sources, draws = deal(self.dealing, key, np.arange(first, first + count, dtype=np.int64))
        indices = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            here = sources == source
            begin, end = int(draws[here][0]), int(draws[here][-1]) + 1
            indices[here] = self._starts[source] + self.corpora[source].drawn(begin, end - begin, key)
        return indices

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Returns the sources (n,) of these samples."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def sample(self, index: int) -> Sample:
        """Returns sample `index`, of whichever corpus it is."""
        source = int(self.source_of(np.array([index]))[0])
        return self.corpora[source].sample(index - self._starts[source])

    def of_vocabulary(self, vocab_size: int) -> "MixedCorpus":
        """Returns it for a model of so many words."""
        return replace(self, corpora=tuple(corpus.of_vocabulary(vocab_size) for corpus in self.corpora))

    def counts(self, number: int, key: str) -> tuple[int, ...]:
        """Returns how many of the samples before `number` of the order each source gives."""
        return counts(self.dealing, key, number)

    @cached_property
    def _starts(self) -> list[int]:
        """Where the samples of each begin, and at last where all end."""
        return [0, *accumulate(corpus.samples for corpus in self.corpora)]


AnyCorpus = Corpus | MixedCorpus


def check_mixture(config: Mixture) -> None:
    """Refuses sources, weights and changes that say nothing, or not one thing. Raises ValueError."""
    if not config.sources:
        raise ValueError(
            "data.sources is empty; give a list of sources, such as data.sources=[{name: text, files: wiki, weight: 3}, ...]"
        )
    for label in config.labels:
        if config.labels.count(label) > 1:
            raise ValueError(f"data.sources: several are called {label!r}; give each a label of its own")
    without = [part.called for part in config.sources if part.weight is None]
    if without and len(without) < len(config.sources):
        raise ValueError(
            f"data.sources: {', '.join(without)} {'has' if len(without) == 1 else 'have'} no weight, and others have one; give "
            "each a weight, or none"
        )
    weights = [part.weight for part in config.sources if part.weight is not None]
    if weights and (min(weights) < 0 or max(weights) == 0):
        raise ValueError(f"data.sources: the weights {weights} are at least 0, and one of them above")
    for change in config.changes:
        _check_change(change, config.labels, bool(without))
    for key, temperature in [
        ("", config.temperature),
        *((".changes", change.temperature) for change in config.changes),
    ]:
        if temperature is not None and temperature <= 0:
            raise ValueError(f"data{key}.temperature={temperature}: it is above 0; 1 leaves the weights as they are")


def _check_change(change: Change, labels: tuple[str, ...], by_size: bool) -> None:
    for label, weight in change.weights.items():
        if label not in labels:
            raise ValueError(f"data.changes: no source is called {label!r}; they are {', '.join(labels)}")
        if weight < 0:
            raise ValueError(f"data.changes: the weight {weight} of {label} is at least 0")
    if change.weights and by_size and set(change.weights) != set(labels):
        raise ValueError(
            "data.changes gives weights, and data.sources has none to go from; give each source a weight there"
        )


def dealing_of(config: Mixture, sizes: tuple[int, ...], seq_len: int) -> Dealing:
    """Returns what the order of a mixture is made of, for sources with so many samples. Raises ValueError where changes overlap, or
    leave no weight."""
    weights, temperature = (
        [_weight(part, size) for part, size in zip(config.sources, sizes, strict=True)],
        config.temperature,
    )
    shares = {0: _shares(weights, temperature)}
    reached = 0
    for change in config.changes:
        at, over = (_samples(key, seq_len) for key in (change.at, change.over))
        if at < reached:
            raise ValueError(
                f"data.changes: the one at {change.at} begins before the one before it is over; put them in order"
            )
        reached = at + over
        now = [change.weights.get(label, old) for label, old in zip(config.labels, weights, strict=True)]
        warmer = temperature if change.temperature is None else change.temperature
        steps = min(RAMP, over)
        for step in range(steps):
            part = (step + 0.5) / steps
            between = [old + part * (new - old) for old, new in zip(weights, now, strict=True)]
            shares[at + over * step // steps] = _shares(between, temperature + part * (warmer - temperature))
        weights, temperature = now, warmer
        shares[reached] = _shares(weights, temperature)
    return Dealing(sizes, tuple(sorted(shares.items())), ends=config.when_short == "stop")


def _weight(part: Part, samples: int) -> float:
    return float(samples if part.weight is None else part.weight)


def _shares(weights: list[float], temperature: float) -> tuple[int, ...]:
    most = max(weights) or 1.0
    return shares_of([(weight / most) ** (1 / temperature) if weight else 0.0 for weight in weights])


def _samples(length: int | float | str, seq_len: int) -> int:
    """The samples of a length in tokens, as `run_length.settle` writes them; of 0, none."""
    return int(read_length("data.changes", length, ("tokens",)).amount) // seq_len if length else 0


def mixed(
    config: Mixture, splits: Sequence[tuple[AnyCorpus, AnyCorpus]], seq_len: int
) -> tuple[MixedCorpus, MixedCorpus]:
    """Returns (training, held-out) of the sources' own. What is held out is dealt as the run begins, every sample once."""
    train, holdout = (tuple(corpora) for corpora in zip(*splits, strict=True))
    dealing = dealing_of(config, tuple(corpus.samples for corpus in train), seq_len)
    held = Dealing(tuple(corpus.samples for corpus in holdout), dealing.shares[:1], ends=True)
    told = [(corpus.fingerprint, corpus.mask_documents) for corpus in train]
    fingerprint = hashlib.sha256(repr((told, dealing)).encode()).hexdigest()
    return (
        MixedCorpus(train, config.labels, dealing, fingerprint),
        MixedCorpus(holdout, config.labels, held, fingerprint),
    )


def require_enough(config: Mixture, corpus: MixedCorpus, samples: int, seed: int) -> None:
    """Refuses a run that reads so many samples of a mixture whose sources do not have them. Raises ValueError."""
    if config.when_short == "stop" and samples > corpus.samples:
        raise ValueError(
            f"data.when_short=stop: the sources have {corpus.samples:,} samples in all, and the run reads {samples:,}; give fewer "
            "steps, more data, or data.when_short=repeat"
        )
    drawn = corpus.counts(samples, f"train/{seed}") if config.when_short == "refuse" else ()
    for label, count, part in zip(config.labels, drawn, corpus.corpora, strict=False):
        if count > part.samples:
            raise ValueError(
                f"data.when_short=refuse: the run reads {count:,} samples of {label}, which has {part.samples:,}; give it "
                "less weight, fewer steps, or data.when_short=repeat or stop"
            )


def sources_in_words(corpus: MixedCorpus, samples: int, seed: int) -> list[str]:
    """Says of each source of a mixture how much of the run it is, in so many samples, and how often it is read."""
    drawn = corpus.counts(min(samples, corpus.dealing.length or samples), f"train/{seed}")
    return [
        f"{label}: {count:,} samples of the run ({count / samples:.3g} of it), which reads its {part.samples:,} "
        f"{count / part.samples:.3g} times"
        for label, count, part in zip(corpus.labels, drawn, corpus.corpora, strict=True)
    ]
