"""Where tokens come from: one dataclass a source, so that a key of another source is an error."""

from dataclasses import dataclass, field
from typing import Literal

from rowwise.conf.option import Ask, MayChange

TokenDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]


@dataclass(frozen=True)
class Stdlib:
    """The Python standard library's own source files, read byte by byte: real text that every machine has."""

    name: MayChange[Literal["stdlib"]] = "stdlib"
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.02
    cache_dir: MayChange[str | None] = None


@dataclass(frozen=True)
class Text:
    """Text files. `files`: paths, folders (searched for .txt and .md) or globs. `tokenizer`: `bytes`, or the path of a
    tokenizer.json. `end_of_text`: the tokenizer's token that ends a document; none by default."""

    name: MayChange[Literal["text"]] = "text"
    files: MayChange[str | list[str]] = field(default_factory=list)
    tokenizer: MayChange[str] = "bytes"
    end_of_text: MayChange[str | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.02
    cache_dir: MayChange[str | None] = None


@dataclass(frozen=True)
class Tokens:
    """Files of tokens, mapped, never copied: raw files of `dtype` (null: what an index of Megatron beside them says, else
    uint16), files that say it themselves (.npy, llm.c's .bin), or folders that Rowwise wrote. `separator`: the token that
    ends a document in a file."""

    name: MayChange[Literal["tokens"]] = "tokens"
    files: MayChange[str | list[str]] = field(default_factory=list)
    dtype: MayChange[TokenDtype | None] = None
    separator: MayChange[int | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.005


@dataclass(frozen=True)
class Hf:
    """A local Hugging Face dataset folder: .parquet, .arrow, .jsonl or .jsonl.gz files with the text in `column`."""

    name: MayChange[Literal["hf"]] = "hf"
    files: MayChange[str | list[str]] = field(default_factory=list)
    column: MayChange[str] = "text"
    tokenizer: MayChange[str] = "bytes"
    end_of_text: MayChange[str | None] = None
    mask_documents: Ask[bool] = False
    holdout: MayChange[float] = 0.005
    cache_dir: MayChange[str | None] = None


DataConfig = Stdlib | Text | Tokens | Hf
