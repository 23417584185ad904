"""The text that `rowwise evaluate` reads: what a run held out, or another, in the tokens of that run. Needs no torch."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from rowwise.launch.compose import compose_tree, key_of
from rowwise.trainer.data.config import DataConfig
from rowwise.trainer.data.corpus import Corpus
from rowwise.trainer.data.mixture import AnyCorpus
from rowwise.trainer.data.open import Data, open_data
from rowwise.trainer.data.own_tokenizer import of_one_tokenizer
from rowwise.trainer.keys import path_to, told_of_type
from rowwise.trainer.manifest_form import Manifest

INHERITED = (
    "tokenizer", "end_of_text", "mask_documents", "separator", "dtype", "column", "template", "template_values", "packing", "too_long",
)  # fmt: skip
_DATA: TypeAdapter[DataConfig] = TypeAdapter(Annotated[DataConfig, Field(discriminator="name")])


@dataclass(frozen=True)
class Text:
    """What is evaluated on: the first `samples` of `corpus` in its order of held-out samples, `micro_size` in a forward.

    `sizes`: of each token the bytes of text that it stands for; None where that cannot be said. `of_run`: the configuration of
    the run where it is what that held out; else None.
    """

    config: DataConfig
    data: Data
    corpus: AnyCorpus
    held_out: bool
    samples: int
    micro_size: int
    sizes: list[int] | None
    of_run: Mapping[str, Any] | None
    remarks: list[str]

    def was_read_by(self, manifest: Manifest) -> bool:
        """Says whether the run evaluated itself on this when it wrote the checkpoint of `manifest`."""
        if self.of_run is None or manifest["fingerprint"]["data"] != self.corpus.fingerprint:
            return False
        keys = (("eval", "batches"), ("batch", "global_size"), ("batch", "seq_len"))
        theirs: Mapping[str, Any] = manifest["config"]
        return all(self.of_run[group][key] == theirs[group][key] for group, key in keys)

    @property
    def told(self) -> str:
        part = "held out" if self.held_out else "all of it"
        return f"data={self.config.name}, {part}: {self.samples:,} of {self.corpus.samples:,} samples of {self.corpus.seq_len} tokens"


@dataclass(frozen=True)
class Amounts:
    """Tokens of a sample, samples of a forward, and batches of `batch.global_size` at most; None: as the run has them, of another
    text all."""

    seq_len: int | None = None
    micro_size: int | None = None
    batches: int | Literal["all"] | None = None


def open_text(words: Sequence[str], amounts: Amounts, manifest: Manifest) -> Text:
    """Opens the text that the overrides `words` name (none: what the run of `manifest` held out), in the tokens of that run.
    Raises ValueError where it has none, or other tokens."""
    ours: Mapping[str, Any] = manifest["config"]
    vocab_size = ours["model"]["vocab_size"]
    source = source_of(ours["data"], words)
    seq_len = amounts.seq_len or ours["batch"]["seq_len"]
    try:
        data = open_data(source, seq_len, sys.maxsize)
    except ValueError as error:
        raise ValueError(str(error).replace("batch.seq_len", "seq_len")) from None
    require_own_tokens(data, source, manifest)
    corpus, held_out = data.holdout, not words or source.holdout > 0
    if not held_out:
        corpus = whole_of(data)
    if not corpus.samples:
        raise ValueError(
            f"data.holdout={source.holdout} holds out no sample of {seq_len} tokens; give data= and data.files= of another text, "
            "or a smaller seq_len"
        )
    batches = amounts.batches or ("all" if words else ours["eval"]["batches"])
    samples = corpus.samples if batches == "all" else min(corpus.samples, batches * ours["batch"]["global_size"])
    same = not words and amounts.seq_len is None and amounts.batches is None
    sizes, why = sizes_of(data, vocab_size)
    remarks = [] if sizes else [f"no bits per byte: {why}"]
    if same and data.train.fingerprint != manifest["fingerprint"]["data"]:
        remarks.append("the data has changed since the run read it: what it holds out now may have been trained on")
    micro_size = amounts.micro_size or ours["batch"]["micro_size"]
    corpus = corpus.of_vocabulary(vocab_size)
    return Text(source, data, corpus, held_out, samples, micro_size, sizes, ours if same else None, remarks)


def whole_of(data: Data) -> Corpus:
    """Returns all that there is of a text, held out or not. Raises ValueError for a mixture."""
    if not isinstance(data.train, Corpus) or not isinstance(data.holdout, Corpus):
        raise ValueError(
            "data=mixture that holds nothing out is several texts: give data= and data.files= of one of them"
        )
    return replace(data.train, streams=(*data.train.streams, *data.holdout.streams))


def source_of(own: Mapping[str, Any], words: Sequence[str]) -> DataConfig:
    """Returns the source that overrides name, with what they leave of the run's own; none: the run's own. Raises ValueError."""
    tree, given = dict(own), {key_of(word): word.partition("=")[2] for word in words}
    if words:
        own = of_one_tokenizer(own)
        composed = compose_tree([f"data={given.pop('data', own['name'])}", *(w for w in words if key_of(w) != "data")])
        inherited = [key for key in INHERITED if key in composed["data"] and own.get(key) is not None]
        tree = composed["data"] | {key: own[key] for key in inherited if f"data.{key}" not in given}
        if given.get("data.tokenizer") == "bytes" and "data.end_of_text" not in given:
            tree["end_of_text"] = None
        if "holdout" in tree and "data.holdout" not in given:
            tree["holdout"] = 0.0
    return data_of(tree)


def data_of(tree: Mapping[str, Any]) -> DataConfig:
    """Returns the source of a plain tree. Raises ValueError for a value of a wrong type."""
    try:
        return _DATA.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, path_to(first, tree)))
        raise ValueError(f"data.{path}={first['input']}: {told_of_type(first)}") from None


def require_own_tokens(data: Data, source: DataConfig, manifest: Manifest) -> None:
    """Refuses tokens that the run's model does not know, and those of another tokenizer. Raises ValueError."""
    vocab_size, own = manifest["config"]["model"]["vocab_size"], manifest["fingerprint"].get("tokenizer")
    if data.vocab_size > vocab_size:
        raise ValueError(
            f"the tokens of data={source.name} go up to {data.vocab_size - 1}, and the model's vocab_size is {vocab_size}: they are "
            "not those of this run; give the text in its tokens, or the data.tokenizer that made them"
        )
    # Behind the / stands what ends a document.
    if data.tokenizer is not None and own is not None and own.split("/")[0] != data.tokenizer.fingerprint.split("/")[0]:
        raise ValueError(
            f"data.tokenizer={getattr(source, 'tokenizer', 'bytes')} is not the tokenizer of this run, whose tokens mean other text; "
            f"leave it out, or give data.tokenizer={of_one_tokenizer(manifest['config']['data']).get('tokenizer', 'bytes')} as the "
            "run read it"
        )


def sizes_of(data: Data, vocab_size: int) -> tuple[list[int] | None, str]:
    """Returns the bytes of text that each token of the model stands for; None, and why, where that cannot be said."""
    if data.tokenizer is None:
        return None, "files of tokens do not say what text they stand for"
    if data.left_out.total():
        return None, "characters of the text have no token and are left out"
    try:
        sizes = data.tokenizer.text_bytes()
    except ValueError as why:
        return None, str(why)
    return sizes + [0] * (vocab_size - len(sizes)), ""
