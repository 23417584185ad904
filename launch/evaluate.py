"""How well a run predicts a text: loss, perplexity and bits per byte of its checkpoints, whole on one process.

    rowwise evaluate run=runs/NAME                              the newest checkpoint, on the text that the run held out
    rowwise evaluate run=runs/NAME steps=all to=held_out.json
    rowwise evaluate run=runs/NAME steps=10,20 data=text data.files=other.txt

    run=PATH             the run, or one checkpoint of it
    steps=10,20          the checkpoints, by step, or all; default: the newest whose checksums are right
    data=SOURCE data.KEY=VALUE
                         a text as a run reads it: all of it, or the share of data.holdout. The run's own tokenizer, end_of_text,
                         mask_documents, separator and dtype are taken where they are not given. Default: what the run held out
    seq_len=N            tokens of a sample, each predicted from those before it there; default: the run's batch.seq_len
    micro_size=N         samples of a forward; default: the run's batch.micro_size
    batches=N            of batch.global_size samples, at most, or all; default: the run's eval.batches of what it held out, else all
    device=DEVICE        cpu, cuda or cuda:N; default: a GPU where there is one
    to=FILE.json         writes the table there too

On what the run held out, with nothing else given, the loss is that of the run's records, which stands beside it. Bits per
byte are of the text that the tokens stand for; they are left out where that cannot be said, and why is told. What is at the end
of the text and fills no sample is left out. Exit code 0: done; 1: a loss is not a number; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from rowwise.launch.checkpoints import Sound, candidates_of, choose_sound, examined
from rowwise.launch.compose import compose_tree, key_of
from rowwise.launch.runs import Run, open_run
from rowwise.launch.settings import parse, read_words
from rowwise.trainer.data.config import DataConfig
from rowwise.trainer.data.corpus import Corpus
from rowwise.trainer.data.open import Data, open_data
from rowwise.trainer.files import to_json, write_whole
from rowwise.trainer.manifest_form import Manifest
from rowwise.trainer.metrics import number

if TYPE_CHECKING:
    from rowwise.trainer.perplexity import Measured

INHERITED = ("tokenizer", "end_of_text", "mask_documents", "separator", "dtype", "column")
Count = Annotated[int, Field(ge=1)]
_DATA: TypeAdapter[DataConfig] = TypeAdapter(Annotated[DataConfig, Field(discriminator="name")])


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys but data and data.*, as they were given."""

    run: str
    steps: str | None = None
    seq_len: Count | None = None
    micro_size: Count | None = None
    batches: Count | Literal["all"] | None = None
    device: str | None = None
    to: str | None = None


@dataclass(frozen=True)
class Row:
    """A checkpoint's figures. `recorded_loss`: what metrics.jsonl has of the same text at that step. A figure that is not known,
    or no number, is None."""

    step: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    recorded_loss: float | None


def main(arguments: list[str] | None = None) -> int:
    """Prints the table. Returns the exit code."""
    words = read_words("rowwise evaluate", __doc__, sys.argv[1:] if arguments is None else arguments)
    data = [word for word in words if word.partition("=")[0].partition(".")[0] == "data"]
    try:
        config = parse(EvaluateConfig, [word for word in words if word not in data], "run=runs/NAME", also=("data",))
        rows = evaluate(config, data)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    spoilt = [row.step for row in rows if row.loss is None]
    if spoilt:
        print(f"failed: the loss of step {', '.join(map(str, spoilt))} is not a number", file=sys.stderr)
    return 1 if spoilt else 0


def evaluate(config: EvaluateConfig, words: Sequence[str] = ()) -> list[Row]:
    """Prints the table, a row as it comes, writes it to `to`, and returns it. `words`: data and data.*, as overrides. Raises
    ValueError."""
    to = None if config.to is None else _file(Path(config.to).expanduser())
    run = open_run(config.run)
    sounds = chosen(run, config.steps)
    text = open_text(config, words, sounds[-1].manifest)
    recorded = {record["step"]: record.get("eval_loss") for record in run.records}
    print(f"{config.run}: {text.told}", *text.remarks, f"{'step':>10}  {_HEAD}", sep="\n", flush=True)
    rows = []
    for sound, found in measured(sounds, text, config.device):
        here = recorded.get(sound.step) if text.was_read_by(sound.manifest) else None
        figures = (found.loss, found.perplexity, found.bits_per_byte, here)
        rows.append(Row(sound.step, *(number(figure) for figure in figures)))
        print(line_of(rows[-1]), flush=True)
    if to is not None:
        write_whole(to, to_json(document(config.run, text, found, rows), indent=1) + "\n")
        print(f"written to {to}")
    return rows


def chosen(run: Run, steps: str | None) -> list[Sound]:
    """The sound checkpoints that `steps` names, in their order. Says what it passes over of all. Raises ValueError."""
    if steps is None:
        return [choose_sound(run.given, None, "steps")]
    if steps != "all":
        numbers = steps.split(",")
        if not all(number.isdigit() for number in numbers):
            raise ValueError(f"steps={steps}: give steps with commas between, such as 10,20, or all")
        named = [candidates_of(run.given, number, "steps")[0] for number in numbers]
        return [examined(checkpoint) for checkpoint in dict.fromkeys(named)]
    sound, complaints = [], []
    for checkpoint in reversed(candidates_of(run.given, None)):
        try:
            sound.append(examined(checkpoint))
        except ValueError as damaged:
            complaints.append(str(damaged))
    if not sound:
        raise ValueError(f"{complaints[-1]}; no sound checkpoint is left, give another run=")
    for complaint in complaints:
        print(f"{complaint}; passed over", file=sys.stderr)
    return sound


@dataclass(frozen=True)
class Text:
    """What is evaluated on: the `samples` first of `corpus`, `micro_size` in a forward. `sizes`: of each token the bytes of text that
    it stands for; None where that cannot be said. `of_run`: the configuration of the run where it is what that held out; else None."""

    config: DataConfig
    data: Data
    corpus: Corpus
    held_out: bool
    samples: int
    micro_size: int
    sizes: list[int] | None
    of_run: Mapping[str, Any] | None
    remarks: list[str]

    def was_read_by(self, manifest: Manifest) -> bool:
        """Whether the run evaluated itself on this when it wrote the checkpoint of `manifest`."""
        if self.of_run is None or manifest["fingerprint"]["data"] != self.corpus.fingerprint:
            return False
        keys = (("eval", "batches"), ("batch", "global_size"), ("batch", "seq_len"))
        theirs: Mapping[str, Any] = manifest["config"]
        return all(self.of_run[group][key] == theirs[group][key] for group, key in keys)

    @property
    def told(self) -> str:
        part = "held out" if self.held_out else "all of it"
        return f"data={self.config.name}, {part}: {self.samples:,} of {self.corpus.samples:,} samples of {self.corpus.seq_len} tokens"


def open_text(config: EvaluateConfig, words: Sequence[str], manifest: Manifest) -> Text:
    """The text that the keys ask for, in the tokens of the run. Raises ValueError where it has none, or other tokens."""
    ours: Mapping[str, Any] = manifest["config"]
    vocab_size = ours["model"]["vocab_size"]
    source = source_of(ours["data"], words)
    seq_len = config.seq_len or ours["batch"]["seq_len"]
    try:
        data = open_data(source, seq_len, sys.maxsize)
    except ValueError as error:
        raise ValueError(str(error).replace("batch.seq_len", "seq_len")) from None
    require_own_tokens(data, source, manifest)
    corpus, held_out = data.holdout, not words or source.holdout > 0
    if not held_out:
        corpus = replace(data.train, streams=(*data.train.streams, *data.holdout.streams))
    if not corpus.samples:
        raise ValueError(
            f"data.holdout={source.holdout} holds out no sample of {seq_len} tokens; give data= and data.files= of another text, "
            "or a smaller seq_len"
        )
    batches = config.batches or ("all" if words else ours["eval"]["batches"])
    samples = corpus.samples if batches == "all" else min(corpus.samples, batches * ours["batch"]["global_size"])
    same = not words and config.seq_len is None and config.batches is None
    sizes, why = sizes_of(data, vocab_size)
    remarks = [] if sizes else [f"no bits per byte: {why}"]
    if same and data.train.fingerprint != manifest["fingerprint"]["data"]:
        remarks.append("the data has changed since the run read it: what it holds out now may have been trained on")
    micro_size = config.micro_size or ours["batch"]["micro_size"]
    corpus = replace(corpus, vocab_size=vocab_size)
    return Text(source, data, corpus, held_out, samples, micro_size, sizes, ours if same else None, remarks)


def source_of(own: Mapping[str, Any], words: Sequence[str]) -> DataConfig:
    """The source that overrides name, with what they leave of the run's own; none: the run's own. Raises ValueError."""
    tree, given = dict(own), {key_of(word): word.partition("=")[2] for word in words}
    if words:
        composed = compose_tree([f"data={given.pop('data', own['name'])}", *(w for w in words if key_of(w) != "data")])
        inherited = [key for key in INHERITED if key in composed["data"] and own.get(key) is not None]
        tree = composed["data"] | {key: own[key] for key in inherited if f"data.{key}" not in given}
        if given.get("data.tokenizer") == "bytes" and "data.end_of_text" not in given:
            tree["end_of_text"] = None
        tree["holdout"] = tree["holdout"] if "data.holdout" in given else 0.0
    try:
        return _DATA.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise ValueError(f"data.{where}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


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
            f"leave it out, or give data.tokenizer={manifest['config']['data'].get('tokenizer', 'bytes')} as the run read it"
        )


def sizes_of(data: Data, vocab_size: int) -> tuple[list[int] | None, str]:
    """The bytes of text that each token of the model stands for; None, and why, where that cannot be said."""
    if data.tokenizer is None:
        return None, "files of tokens do not say what text they stand for"
    if data.left_out.total():
        return None, "characters of the text have no token and are left out"
    try:
        sizes = data.tokenizer.text_bytes()
    except ValueError as why:
        return None, str(why)
    return sizes + [0] * (vocab_size - len(sizes)), ""


def measured(sounds: Sequence[Sound], text: Text, device: str | None) -> Iterator[tuple[Sound, "Measured"]]:
    """What each checkpoint gives the text. Raises ValueError where the text is damaged."""
    from rowwise.trainer.data.batches import BatchConfig, Share, holdout_batches  # torch, which no refusal waits for
    from rowwise.trainer.perplexity import measure
    from rowwise.trainer.whole import Source, device_named, fill_, load_model

    model, batch = None, BatchConfig(text.samples, micro_size=text.micro_size, seq_len=text.corpus.seq_len)
    for sound in sounds:
        source = Source(sound.path, sound.manifest)
        if model is None:
            model = load_model(source, device_named(device))
        else:
            fill_(model, source)
        found = measure(model, holdout_batches(text.corpus, batch, 1, Share()), text.sizes, source.tf32)
        if text.data.watch.complaint is not None:
            raise ValueError(text.data.watch.complaint)
        yield sound, found


_HEAD = "      loss  perplexity  bits per byte  recorded loss"


def line_of(row: Row) -> str:
    figures = (
        (row.loss, 10, ".6f"),
        (row.perplexity, 12, ",.4g"),
        (row.bits_per_byte, 15, ".6f"),
        (row.recorded_loss, 15, ".6f"),
    )
    return f"{row.step:>10}" + "".join(
        f"{'-' if x is None else format(x, form):>{width}}" for x, width, form in figures
    )


def document(run: str, text: Text, found: "Measured", rows: Sequence[Row]) -> dict[str, Any]:
    """The table as plain values."""
    return {
        "run": run,
        "data": asdict(text.config),
        "samples": text.samples,
        "seq_len": text.corpus.seq_len,
        "tokens": found.tokens,
        "text_bytes": found.text_bytes,
        "checkpoints": [asdict(row) for row in rows],
    }


def _file(path: Path) -> Path:
    if path.suffix != ".json" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"to={path}: give the name of a file that ends in .json, in a folder that is there")
    return path


if __name__ == "__main__":
    sys.exit(main())
