"""Where tokens come from: one dataclass a source, so that a key of another source is an error."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rowwise.conf.option import Ask, MayChange
from rowwise.trainer.data.chat.config import Chat
from rowwise.trainer.data.documents import Found, rows_of, stdlib_files
from rowwise.trainer.data.kinds import check_rows
from rowwise.trainer.data.pieces import Document
from rowwise.trainer.data.source import TextSource
from rowwise.trainer.data.tokenizer import Tokenizer, open_tokenizer

TokenDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]


@dataclass(frozen=True)
class Stdlib(TextSource):
    """The Python standard library's own source files, read byte by byte: real text that every machine has.
    `mask_documents`: attention stays inside a document. `holdout`: the share of the tokens that is held out, 0 to below 1.
    `cache_dir`: where its tokens are kept; null: the user's cache folder."""

    ENDINGS = (".py",)
    name: MayChange[Literal["stdlib"]] = "stdlib"
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.02
    cache_dir: MayChange[str | None] = None

    def find(self) -> Found:
        return Found(tuple(stdlib_files(Path(sysconfig.get_paths()["stdlib"]))))

    def check(self, path: Path) -> None:
        """Takes them all: that they are Python's own is enough."""

    def open_tokenizer(self) -> Tokenizer:
        return open_tokenizer("bytes")


@dataclass(frozen=True)
class Text(TextSource):
    """Text files. `files`: paths, folders (searched for .txt and .md) or globs. `tokenizer`: `bytes`, or the path of a
    tokenizer.json. `end_of_text`: the tokenizer's token that ends a document; null: none. `mask_documents`: attention stays
    inside a document. `holdout`: the share of the tokens that is held out, 0 to below 1. `cache_dir`: where its tokens are
    kept; null: the user's cache folder."""

    ENDINGS = (".txt", ".md")
    name: MayChange[Literal["text"]] = "text"
    files: MayChange[str | list[str]] = field(default_factory=list)
    tokenizer: MayChange[str] = "bytes"
    end_of_text: MayChange[str | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.02
    cache_dir: MayChange[str | None] = None


@dataclass(frozen=True)
class Tokens:
    """Files of tokens, mapped, never copied: raw ones, ones that say what they hold (.npy, llm.c's .bin), or folders that
    Rowwise wrote. `files`: paths, folders or globs. `dtype`: of raw files; null: what an index of Megatron beside them
    says, else uint16. `separator`: the token that ends a document in a file; null: documents are as that index has them,
    else one a file. `mask_documents`: attention stays
    inside a document. `holdout`: the share of the tokens that is held out, 0 to below 1."""

    ENDINGS: ClassVar[tuple[str, ...]] = (".bin", ".npy")
    name: MayChange[Literal["tokens"]] = "tokens"
    files: MayChange[str | list[str]] = field(default_factory=list)
    dtype: MayChange[TokenDtype | None] = None
    separator: MayChange[int | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.005


@dataclass(frozen=True)
class Hf(TextSource):
    """A local Hugging Face dataset folder. `files`: .parquet, .arrow, .jsonl, .jsonl.gz or .jsonl.zst files, folders of them, or
    globs.
    `column`: the one that holds the text. `tokenizer`: `bytes`, or the path of a tokenizer.json. `end_of_text`: the
    tokenizer's token that ends a document; null: none. `mask_documents`: attention stays inside a document. `holdout`: the
    share of the tokens that is held out, 0 to below 1. `cache_dir`: where its tokens are kept; null: the user's cache
    folder."""

    # Not .json: such files of a saved dataset describe it.
    ENDINGS, AS_LARGE = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst"), False
    name: MayChange[Literal["hf"]] = "hf"
    files: MayChange[str | list[str]] = field(default_factory=list)
    column: MayChange[str] = "text"
    tokenizer: MayChange[str] = "bytes"
    end_of_text: MayChange[str | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.005
    cache_dir: MayChange[str | None] = None

    def check(self, path: Path) -> None:
        check_rows(path)

    def documents(self, path: Path, folder: Path) -> Iterator[Document]:
        yield from rows_of(path, self.column, folder)


Source = Stdlib | Text | Tokens | Hf | Chat


@dataclass(frozen=True)
class Part:
    """A source of a mixture. `data`: the source, with the keys of its own. `weight`: its share is proportional to it; null, of all
    sources: as many samples as they have. `label`: what it is called; null: as the source."""

    data: Annotated[Source, Field(discriminator="name")]
    weight: MayChange[float | None] = None
    label: MayChange[str | None] = None

    @property
    def called(self) -> str:
        return self.label or self.data.name


@dataclass(frozen=True)
class Change:
    """What a mixture is from some point on. `at`: a length of the run, before which nothing of it holds. `weights`: by label, of the
    sources whose weight changes. `temperature`: another one; null: as before. `over`: the length in which weights and temperature
    go from the old to the new, in equal steps; 0: at once."""

    at: Ask[int | float | str]
    weights: Ask[dict[str, float]] = field(default_factory=dict)
    temperature: Ask[float | None] = None
    over: Ask[int | float | str] = 0


@dataclass(frozen=True)
class Mixture:
    """Several sources, mixed sample by sample. `sources`: each with the keys of a data source (`name`, `files`, ...), and of `weight`
    and `label`. `temperature`: shares are as weight^(1 / temperature): 1 as the weights are, above it more equal. `changes`: from
    `at` (an interval: steps, tokens or a share of the run) on other `weights` (by label) or another `temperature`, reached
    `over` an interval. `when_short`: a source whose samples are all read begins again (`repeat`), leaves its share to the
    others (`stop`), or the run is refused (`refuse`)."""

    ENDINGS: ClassVar[tuple[str, ...]] = ()
    name: MayChange[Literal["mixture"]] = "mixture"
    sources: MayChange[list[Part]] = field(default_factory=list)
    temperature: Ask[float] = 1.0
    changes: Ask[list[Change]] = field(default_factory=list)
    when_short: Ask[Literal["repeat", "stop", "refuse"]] = "repeat"

    @property
    def holdout(self) -> float:
        """The largest share that one of them holds out."""
        return max((part.data.holdout for part in self.sources), default=0.0)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(part.called for part in self.sources)


DataConfig = Source | Mixture
