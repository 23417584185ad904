"""Where tokens come from: one dataclass a source, so that a key of another source is an error."""

from dataclasses import dataclass, field
from typing import Literal

from rowwise.conf.option import Ask, MayChange

TokenDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]


@dataclass(frozen=True)
class Stdlib:
    """The Python standard library's own source files, read byte by byte: real text that every machine has.
    `mask_documents`: attention stays inside a document. `holdout`: the share of the tokens that is held out, 0 to below 1.
    `cache_dir`: where its tokens are kept; null: the user's cache folder."""

    name: MayChange[Literal["stdlib"]] = "stdlib"
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.02
    cache_dir: MayChange[str | None] = None


@dataclass(frozen=True)
class Text:
    """Text files. `files`: paths, folders (searched for .txt and .md) or globs. `tokenizer`: `bytes`, or the path of a
    tokenizer.json. `end_of_text`: the tokenizer's token that ends a document; null: none. `mask_documents`: attention stays
    inside a document. `holdout`: the share of the tokens that is held out, 0 to below 1. `cache_dir`: where its tokens are
    kept; null: the user's cache folder."""

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
    says, else uint16. `separator`: the token that ends a document in a file; null: none. `mask_documents`: attention stays
    inside a document. `holdout`: the share of the tokens that is held out, 0 to below 1."""

    name: MayChange[Literal["tokens"]] = "tokens"
    files: MayChange[str | list[str]] = field(default_factory=list)
    dtype: MayChange[TokenDtype | None] = None
    separator: MayChange[int | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.005


@dataclass(frozen=True)
class Hf:
    """A local Hugging Face dataset folder. `files`: .parquet, .arrow, .jsonl or .jsonl.gz files, folders of them, or globs.
    `column`: the one that holds the text. `tokenizer`: `bytes`, or the path of a tokenizer.json. `end_of_text`: the
    tokenizer's token that ends a document; null: none. `mask_documents`: attention stays inside a document. `holdout`: the
    share of the tokens that is held out, 0 to below 1. `cache_dir`: where its tokens are kept; null: the user's cache
    folder."""

    name: MayChange[Literal["hf"]] = "hf"
    files: MayChange[str | list[str]] = field(default_factory=list)
    column: MayChange[str] = "text"
    tokenizer: MayChange[str] = "bytes"
    end_of_text: MayChange[str | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.005
    cache_dir: MayChange[str | None] = None


DataConfig = Stdlib | Text | Tokens | Hf
