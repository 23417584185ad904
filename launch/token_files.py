"""Text as files of tokens, made once by many processes, for runs that read them with data=tokens.

    rowwise tokenize data=text data.files=wiki data.tokenizer=tokenizer.json to=tokens nproc=16
    rowwise train data=tokens data.files=tokens ...

    data=..., data.*     the text, as a run takes it: data=text, hf, stdlib, or a mixture of those
    to=DIR               the folder to make; it must not exist, or be empty. Of a mixture it has a folder for each source, by
                         its label
    nproc=N              processes that make tokens, beside the one that reads and writes; default: as many as there are cores

DIR has the tokens of training and those held out (data.holdout), where documents begin, and a record with hashes of all. It is the
same for every nproc. Memory is bounded, whatever the size of the text: a few batches of a megabyte a process.

Exit code 0: DIR is complete; 2: refused, and there is no DIR. It gets its name last: what a killed one leaves behind
is DIR.incomplete, which the next one removes.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rowwise.launch.compose import compose_tree
from rowwise.launch.evaluated import data_of
from rowwise.launch.settings import free_folder, parse, read_words
from rowwise.trainer.data.chat.config import Chat
from rowwise.trainer.data.config import DataConfig, Mixture, Tokens
from rowwise.trainer.data.integrity import Record
from rowwise.trainer.data.many import write_tokens
from rowwise.trainer.data.mixture import check_mixture
from rowwise.trainer.data.source import TextSource
from rowwise.trainer.files import new_folder
from rowwise.trainer.screen import count

MOST = 1024  # processes


@dataclass(frozen=True)
class TokenizeConfig:
    """The keys of the command's own, as they were given."""

    to: str
    nproc: int | None = None


def main(arguments: list[str] | None = None) -> int:
    """Tokenizes. Returns the exit code."""
    words = read_words("rowwise tokenize", __doc__, sys.argv[1:] if arguments is None else arguments)
    data = [word for word in words if word.partition("=")[0].partition(".")[0] == "data"]
    own = [word for word in words if word not in data]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes, whose threads would be in each other's way
    try:
        for line in tokenize(parse(TokenizeConfig, own, "data=text data.files=FOLDER to=DIR", also=("data",)), data):
            print(line)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def tokenize(config: TokenizeConfig, words: Sequence[str]) -> list[str]:
    """Makes the folder, and returns a line for each source. `words`: data and data.*, as overrides. Raises ValueError."""
    workers = config.nproc if config.nproc is not None else len(os.sched_getaffinity(0))
    if not 1 <= workers <= MOST:
        raise ValueError(f"nproc={workers}: 1 to {MOST} processes")
    folder = free_folder(Path(config.to).expanduser())
    sources = sources_of(data_of(compose_tree(words)["data"]))
    found = {label: source.find() for label, source in sources.items()}
    with new_folder(folder) as partial:
        told = []
        for label, source in sources.items():
            inside = partial if len(sources) == 1 and not label else partial / label
            inside.mkdir(exist_ok=True)
            what = f"data={source.name}{f', {label}' if label else ''}"
            try:
                record = write_tokens(source, found[label], inside, workers, what)
            except ValueError as error:
                raise ValueError(f"data.sources, {label}: {error}" if label else str(error)) from None
            told.append(in_words(folder / label, record, len(found[label].files)))
    return told


def sources_of(data: DataConfig) -> dict[str, TextSource]:
    """Returns the texts, by the folder that each gets: of a mixture its label, else none. Raises ValueError for what is none."""
    if isinstance(data, Mixture):
        check_mixture(data)
    named = [(part.called, part.data) for part in data.sources] if isinstance(data, Mixture) else [("", data)]
    found: dict[str, TextSource] = {}
    for label, source in named:
        if isinstance(source, Tokens) or not isinstance(source, TextSource):
            raise ValueError(f"data={source.name} holds tokens already; give a text: data=text, data=hf or data=stdlib")
        if isinstance(source, Chat):
            raise ValueError("data=chat keeps beside its tokens which are learned, and a run makes both; give a text")
        if not 0 <= source.holdout < 1:
            raise ValueError(f"data.holdout={source.holdout}: a share from 0 to below 1")
        if Path(label).name != label or label == "..":
            raise ValueError(f"data.sources: the label {label!r} is the name of a folder here; give one without /")
        found[label] = source
    return found


def in_words(folder: Path, record: Record, files: int) -> str:
    """Says what was made of one source."""
    train, held = record.tokens["train"], record.tokens["holdout"]
    left_out = sum(record.left_out.values())
    lost = f"; {left_out:,} characters have no token and are left out" if left_out else ""
    return (
        f"{folder}: {count(train + held)} tokens of {files:,} file{'s' * (files > 1)}, {held:,} of them held out, "
        f"{record.dtype}, of a vocabulary of {record.vocab_size:,}{lost}"
    )


if __name__ == "__main__":
    sys.exit(main())
