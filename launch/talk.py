"""A conversation with a run's model, by the chat template of its tokenizer; for `rowwise generate chat=true`."""

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rowwise.trainer.data.chat.forms import Message
from rowwise.trainer.data.chat.renderer import Renderer
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from rowwise.trainer.generate import Writer
    from rowwise.trainer.sample import Sampling


@dataclass(frozen=True)
class Manner:
    """How the model answers: what the conversation begins with, the tokens of an answer at most, and how they are drawn."""

    system: str | None
    most: int
    sampling: "Sampling"


def talk(writer: "Writer", lines: Iterable[str], manner: Manner) -> None:
    """Answers each line as the next message of one conversation, up to the token that ends a turn. Ctrl-C ends an answer, which is
    kept as far as it came; a message that the template refuses is none. Raises ValueError where the template takes no
    conversation, and FloatingPointError where the model's numbers are not finite."""
    tokenizer, messages = writer.tokenizer, list[Message]()
    assert isinstance(tokenizer, ChatTokenizer)
    if manner.system is not None:
        messages.append({"role": "system", "content": manner.system})
    with Renderer(tokenizer.template) as renderer:
        writer = replace(writer, end_token=tokenizer.end_of_turn(renderer))
        for number, line in enumerate(lines):
            asked: Message = {"role": "user", "content": line}
            try:
                prompt = renderer.prompt([*messages, asked])
            except ValueError as refusal:
                print(f"refused: {refusal}", file=sys.stderr)
                continue
            answer: list[str] = []
            with contextlib.suppress(KeyboardInterrupt):
                tell_of_length(writer, prompt)
                sampling = replace(manner.sampling, seed=manner.sampling.seed + number)
                show(_kept(writer.write(prompt, manner.most, sampling), answer))
            print(flush=True)
            messages += [asked, {"role": "assistant", "content": "".join(answer)}]


def _kept(pieces: Iterable[str], place: list[str]) -> Iterator[str]:
    for piece in pieces:
        place.append(piece)
        yield piece


def tell_of_length(writer: "Writer", prompt: str) -> None:
    """Says on stderr where the model sees not all of a prompt. Raises ValueError where it has no token."""
    if (long := len(writer.encode(prompt))) > writer.context:
        told = f"the prompt has {long:,} tokens, and the model looks back {writer.context:,} (batch.seq_len): it sees the last"
        print(told, file=sys.stderr)


def show(pieces: Iterable[str]) -> None:
    """Writes a text to standard output as it comes."""
    for piece in pieces:
        print(harmless(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def harmless(text: str) -> str:
    """Returns the text without what a terminal would obey: control characters but line breaks and tabs are U+FFFD."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )
