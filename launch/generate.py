"""Text from a run's model, whole on one process, whatever layout it was trained on.

    rowwise generate run=runs/NAME prompt='def main('
    rowwise generate run=runs/NAME prompt_file=PATH temperature=0
    rowwise generate run=runs/NAME                        on a terminal: asks for prompt after prompt; else reads standard input
    rowwise generate run=runs/NAME chat=true              a conversation: a message a line, and what the model answers

    run=PATH             the run, or one checkpoint of it
    prompt=TEXT          what the text begins with; or prompt_file=PATH, or standard input, without the newline at its end
    step=STEP            the checkpoint; default: the newest whose checksums are right
    max_tokens=160       at most; it ends at the token that ends a document, where the run has one
    temperature=0.7      0: always the likeliest token
    top_k=0              of the likeliest tokens, how many may be drawn; 0: all
    top_p=1              of the likeliest tokens, those that have this share of the probability
    seed=0               of what is drawn: the same text again; of a person's second prompt seed + 1, and so on
    chat=false           true: by the chat template of the run, or of the folder that tokenizer= names; prompt= is one message
    system=TEXT          of a conversation: its first message
    tokenizer=PATH       of a run that read tokens: the tokenizer.json that made them, or bytes; default: the run's own
    weights=last         of a run with average.ema: those of the last step; default: the average
    device=DEVICE        cpu, cuda or cuda:N; default: a GPU where there is one
    model=FILE.py:NAME   of a run of a model of one's own: its code, which is run

The text, prompt and all, goes to standard output as it is written. The model looks back batch.seq_len tokens; up to there
it keeps keys and values, beyond it a token costs as much as batch.seq_len tokens. Exit code 0: written; 1: the model's
numbers are not finite; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from rowwise.launch.checkpoints import Weights
from rowwise.launch.runs import open_run
from rowwise.launch.settings import parse, read_words
from rowwise.launch.talk import Manner, show, talk, tell_of_length

if TYPE_CHECKING:
    from rowwise.trainer.generate import Writer
    from rowwise.trainer.sample import Sampling


@dataclass(frozen=True)
class GenerateConfig:
    """The keys."""

    run: str
    prompt: str | None = None
    prompt_file: str | None = None
    step: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 160
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.7
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    tokenizer: str | None = None
    weights: Weights | None = None
    device: str | None = None
    chat: bool = False
    system: str | None = None
    model: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Writes. Returns the exit code."""
    words = read_words("rowwise generate", __doc__, sys.argv[1:] if arguments is None else arguments)
    try:
        config = parse(GenerateConfig, words, "run=runs/NAME prompt=TEXT")
        generate(config)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except FloatingPointError as end:
        print(
            f"\nfailed: {end}; give another step=, or see the run's metrics.jsonl for where it went wrong",
            file=sys.stderr,
        )
        return 1
    return 0


def generate(config: GenerateConfig) -> None:
    """Writes what the keys ask for to standard output. Raises ValueError, and FloatingPointError where the model's numbers are
    not finite."""
    if config.system is not None and not config.chat:
        raise ValueError(f"system={config.system}: a conversation begins with it; give chat=true too")
    prompt = None if config.chat and config.prompt is config.prompt_file is None else given_prompt(config)
    writer = open_run(config.run, config.model).writer(
        config.step, config.tokenizer, config.device, config.weights, config.chat
    )
    from rowwise.trainer.sample import Sampling  # torch, which no refusal above waits for

    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    if config.chat:
        talk(
            writer,
            messages() if prompt is None else [prompt],
            Manner(config.system, config.max_tokens, sampling),
        )
        return
    if prompt is not None:
        write(writer, prompt, config.max_tokens, sampling, shown=prompt)
        return
    print("a prompt a line; Ctrl-D ends", file=sys.stderr)
    for number, line in enumerate(asked()):
        try:
            write(writer, line, config.max_tokens, replace(sampling, seed=config.seed + number), shown="")
        except ValueError as refusal:
            print(refusal, file=sys.stderr)


def write(writer: "Writer", prompt: str, most: int, sampling: "Sampling", shown: str) -> None:
    """Writes what comes after `prompt`, as it comes, behind what is `shown` of it."""
    tell_of_length(writer, prompt)
    show(itertools.chain([shown], writer.write(prompt, most, sampling)))
    print(flush=True)


def given_prompt(config: GenerateConfig) -> str | None:
    """Returns the prompt that the keys or standard input give; None where a person is to be asked. Raises ValueError."""
    if config.prompt is not None and config.prompt_file is not None:
        raise ValueError("prompt= and prompt_file= are both given; give one")
    if config.prompt is not None:
        return config.prompt
    if config.prompt_file is not None:
        path = Path(config.prompt_file).expanduser()
        try:
            return _text(path.read_bytes(), f"prompt_file={path}")
        except OSError as error:
            raise ValueError(f"prompt_file={path} cannot be read ({error.strerror})") from None
    if sys.stdin is None:  # closed by who started this
        return _text(b"", "standard input")
    return None if sys.stdin.isatty() else _text(sys.stdin.buffer.read(), "standard input")


def _text(content: bytes, origin: str) -> str:
    """Raises ValueError where it is no text."""
    try:
        text = content.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{origin} is no UTF-8; give text") from None
    if not text:
        raise ValueError(f"{origin} is empty; give prompt=TEXT")
    return text


def asked() -> Iterator[str]:
    """Yields the lines that a person types, without the empty ones, up to Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and the lines before
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line:
            yield line


def messages() -> Iterator[str]:
    """Yields the messages that a person types, where Ctrl-C drops a line; else the lines of standard input."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield from filter(None, (_text(b"", "standard input") if sys.stdin is None else sys.stdin.read()).splitlines())
        return
    print("a message a line; Ctrl-C ends an answer, Ctrl-D the conversation", file=sys.stderr)
    lines = asked()
    while True:
        try:
            yield next(lines)
        except KeyboardInterrupt:
            print()
            lines = asked()
        except StopIteration:
            return


if __name__ == "__main__":
    sys.exit(main())
