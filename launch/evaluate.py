"""How well a run predicts a text: loss, perplexity and bits per byte of its checkpoints, whole on one process.

    rowwise evaluate run=runs/NAME                              the newest checkpoint, on the text that the run held out
    rowwise evaluate run=runs/NAME steps=all to=held_out.json
    rowwise evaluate run=runs/NAME steps=10,20 data=text data.files=other.txt
    rowwise evaluate run=runs/NAME tasks=arc_easy,hellaswag limit=200

    run=PATH             the run, or one checkpoint of it
    steps=10,20          the checkpoints, by step, or all; default: the newest whose checksums are right
    data=SOURCE data.KEY=VALUE
                         a text as a run reads it: all of it, or the share of data.holdout. The run's own tokenizer, end_of_text,
                         mask_documents, separator and dtype are taken where they are not given. Default: what the run held out
    seq_len=N            tokens of a sample, each predicted from those before it there; default: the run's batch.seq_len
    micro_size=N         samples of a forward; default: the run's batch.micro_size
    batches=N            of batch.global_size samples, at most, or all; default: the run's eval.batches of what it held out, else all
    weights=last         of a run with average.ema: those of the last step; default: the average
    device=DEVICE        cpu, cuda or cuda:N; default: a GPU where there is one
    to=FILE.json         writes the table there too
    model=FILE.py:NAME   of a run of a model of one's own: its code, which is run

In place of a text, tasks of lm-evaluation-harness (pip install 'rowwise[tasks]'), one line a metric:

    tasks=NAME,NAME      the harness's, whose data it downloads, or those of
    tasks_folder=DIR     YAML files of one's own (which may run code of theirs)
    shots=N              examples before each question; default: as the task says
    limit=N              the first questions of a task; default: all
    tokenizer=PATH       of a run that read tokens: the tokenizer.json that made them, or bytes

On what the run held out, with nothing else given, the loss is that of the run's records, which stands beside it. Bits per
byte are of the text that the tokens stand for; they are left out where that cannot be said, and why is told. What is at the end
of the text and fills no sample is left out. Exit code 0: done; 1: a loss is not a number; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rowwise.launch.checkpoints import Sound, Weights, average_of, candidates_of, choose_sound, examined, means_last
from rowwise.launch.evaluated import Amounts, Text, open_text
from rowwise.launch.runs import Run, open_run
from rowwise.launch.settings import parse, read_words
from rowwise.trainer.files import to_json, write_whole
from rowwise.trainer.metrics import number

if TYPE_CHECKING:
    from rowwise.launch.tasks import Score
    from rowwise.trainer.perplexity import Measured

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class EvaluateConfig:
    """The keys but data and data.*, as they were given."""

    run: str
    steps: str | None = None
    seq_len: Count | None = None
    micro_size: Count | None = None
    batches: Count | Literal["all"] | None = None
    weights: Weights | None = None
    device: str | None = None
    to: str | None = None
    model: str | None = None
    tasks: str | None = None
    tasks_folder: str | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    limit: Count | None = None
    tokenizer: str | None = None


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
        if config.tasks is not None:
            evaluate_tasks(config, data)
            return 0
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
    for key in ("tasks_folder", "shots", "limit", "tokenizer"):
        if getattr(config, key) is not None:
            raise ValueError(f"{key}={getattr(config, key)}: it is for tasks; give tasks=NAME, or leave it out")
    to = None if config.to is None else _file(Path(config.to).expanduser())
    run = open_run(config.run, config.model)
    sounds = chosen(run, config.steps)
    for sound in sounds:
        means_last(sound.manifest, config.weights)
    text = open_text(words, Amounts(config.seq_len, config.micro_size, config.batches), sounds[-1].manifest)
    recorded = {record["step"]: record.get("eval_loss") for record in run.records}
    print(f"{config.run}: {text.told}", *text.remarks, f"{'step':>10}  {_HEAD}", sep="\n", flush=True)
    rows = []
    for sound, found in measured(sounds, text, config):
        other = config.weights == "last" and average_of(sound.manifest) is not None
        here = recorded.get(sound.step) if text.was_read_by(sound.manifest) and not other else None
        figures = (found.loss, found.perplexity, found.bits_per_byte, here)
        rows.append(Row(sound.step, *(number(figure) for figure in figures)))
        print(line_of(rows[-1]), flush=True)
    if to is not None:
        write_whole(to, to_json(document(config.run, text, found, rows), indent=1) + "\n")
        print(f"written to {to}")
    return rows


def evaluate_tasks(config: EvaluateConfig, words: Sequence[str] = ()) -> "list[tuple[int, Score]]":
    """Prints what each task finds of each checkpoint, writes it to `to`, and returns it. Raises ValueError."""
    for given in (*words, *(f"{key}={value}" for key in ("batches", "seq_len") if (value := getattr(config, key)))):
        raise ValueError(f"{given} with tasks={config.tasks}: a task has its own questions; leave it out, or tasks")
    to = None if config.to is None else _file(Path(config.to).expanduser())
    run = open_run(config.run, config.model)
    sounds = chosen(run, config.steps)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"tasks={config.tasks}: lm-evaluation-harness is not installed; pip install 'rowwise[tasks]'")
    writers = (
        (sound.step, run.writer(sound.step, config.tokenizer, config.device, config.weights)) for sound in sounds
    )
    names = [name for name in (config.tasks or "").split(",") if name]
    found: list[tuple[int, Score]] = []
    for step, writer in writers:
        from rowwise.launch.tasks import Tasks, run_tasks  # the harness, which no checkpoint that is refused waits for

        tasks = Tasks(names, config.tasks_folder, config.shots, config.limit, config.micro_size or 8)
        for score in run_tasks(writer, tasks):
            error = "" if score.error is None else f" +- {score.error:.4f}"
            print(f"{step:>10}  {score.task}  {score.metric}  {score.value:.4f}{error}", flush=True)
            found.append((step, score))
    if to is not None:
        rows = [{"step": step, **asdict(score)} for step, score in found]
        write_whole(to, to_json({"run": config.run, "tasks": rows}, indent=1) + "\n")
        print(f"written to {to}")
    return found


def chosen(run: Run, steps: str | None) -> list[Sound]:
    """Returns the sound checkpoints that `steps` names, in their order. Says what it passes over of all. Raises ValueError."""
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


def measured(sounds: Sequence[Sound], text: Text, config: EvaluateConfig) -> Iterator[tuple[Sound, "Measured"]]:
    """Yields what each checkpoint gives the text. Raises ValueError where the text is damaged."""
    from rowwise.trainer.data.batches import BatchConfig, Share, holdout_batches  # torch, which no refusal waits for
    from rowwise.trainer.perplexity import measure
    from rowwise.trainer.whole import Source, device_named, fill_, load_model

    model, batch = None, BatchConfig(text.samples, micro_size=text.micro_size, seq_len=text.corpus.seq_len)
    for sound in sounds:
        source = Source(sound.path, sound.manifest, means_last(sound.manifest, config.weights), config.model)
        if model is None:
            model = load_model(source, device_named(config.device))
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
    """Returns the table of figures as plain values."""
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
