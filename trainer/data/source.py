"""What a source of text is, beside its keys: which files it reads, how documents come out of them, and by which tokenizer they
become tokens. Everything else (the cache, held-out text, the order, the batches) is the same for all.
"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

from rowwise.trainer.data.documents import Found, find_files, whole_file
from rowwise.trainer.data.kinds import check_text
from rowwise.trainer.data.pieces import Document
from rowwise.trainer.data.tokenizer import Tokenizer, open_tokenizer

_NOT_OF_READING = ("name", "files", "tokenizer", "end_of_text", "mask_documents", "holdout", "cache_dir")


class TextSource:
    """A source whose dataclass has at least these keys. As it stands here, each of `data.files` is a document. `ENDINGS`: of the
    files that it takes out of a folder. `AS_LARGE`: whether its text takes as many bytes as its files."""

    ENDINGS: ClassVar[tuple[str, ...]]
    AS_LARGE: ClassVar[bool] = True
    name: str
    files: str | list[str]
    tokenizer: str
    end_of_text: str | None
    mask_documents: bool
    holdout: float
    cache_dir: str | None

    def find(self) -> Found:
        """Lists its files, in a fixed order. Raises ValueError where there are none."""
        return find_files(self.files, self.ENDINGS)

    def check(self, path: Path) -> None:
        """Refuses a file of another kind than it reads. Raises ValueError."""
        check_text(path)

    def documents(self, path: Path, folder: Path) -> Iterator[Document]:
        """Reads the documents of one file. Texts too long for memory may pass through files in `folder`. Raises ValueError."""
        yield whole_file(path)

    def open_tokenizer(self) -> Tokenizer:
        """Opens what makes tokens of its text. Raises ValueError."""
        return open_tokenizer(self.tokenizer, self.end_of_text)

    def reading(self) -> str:
        """Gives the keys of its own that decide how files are read, so that another value is another cache."""
        return "\0".join(str(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_OF_READING)  # type: ignore[arg-type]
