"""Where tokens come from: one dataclass a source, so that a key of another source is an error."""

from dataclasses import dataclass, field
from typing import Literal

TokenDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]


@dataclass(frozen=True)
class Stdlib:
    """The Python standard library's own source files, read byte by byte: real text that every machine has."""

    name: Literal["stdlib"] = "stdlib"
    mask_documents: bool = False
    holdout: float = 0.02
    cache_dir: str | None = None


@dataclass(frozen=True)
class Text:
    """Text files. `files`: paths, folders (searched for .txt and .md) or globs. `tokenizer`: `bytes`, or the path of a
    tokenizer.json. `end_of_text`: the tokenizer's token that ends a document; none by default."""

    name: Literal["text"] = "text"
    files: str | list[str] = field(default_factory=list)
    tokenizer: str = "bytes"
    end_of_text: str | None = None
    mask_documents: bool = False
    holdout: float = 0.02
    cache_dir: str | None = None


@dataclass(frozen=True)
class Tokens:
    """Files of tokens, mapped, never copied: raw files of `dtype` (null: what an index of Megatron beside them says, else
    uint16), files that say it themselves (.npy, llm.c's .bin), or folders that Rowwise wrote. `separator`: the token that
    ends a document in a file."""

    name: Literal["tokens"] = "tokens"
    files: str | list[str] = field(default_factory=list)
    dtype: TokenDtype | None = None
    separator: int | None = None
    mask_documents: bool = False
    holdout: float = 0.005


@dataclass(frozen=True)
class Hf:
    """A local Hugging Face dataset folder: .parquet, .arrow, .jsonl or .jsonl.gz files with the text in `column`."""

    name: Literal["hf"] = "hf"
    files: str | list[str] = field(default_factory=list)
    column: str = "text"
    tokenizer: str = "bytes"
    end_of_text: str | None = None
    mask_documents: bool = False
    holdout: float = 0.005
    cache_dir: str | None = None


DataConfig = Stdlib | Text | Tokens | Hf
