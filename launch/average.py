"""The mean of a run's checkpoints, as a run of its own, which generates, is evaluated, exported and trained on like any other.

    rowwise average run=runs/NAME last=5 to=runs/NAME-mean
    rowwise average run=runs/NAME steps=800,900,1000 fisher=true to=runs/NAME-mean
    rowwise average run=runs/NAME last=1 start=org-model/ share=0.5 to=runs/NAME-half

    run=PATH             the run
    last=N               how many of its newest checkpoints; or steps=10,20, which of them
    to=DIR               the folder to make; it must not exist, or be empty
    fisher=true          each number counts by its Fisher information, the mean square of its gradient over `samples` samples of what
                         the run trained on (Matena & Raffel); the model, its gradients and sums are then in memory whole
    samples=64           for that
    start=PATH           what the mean is mixed with: a run, a checkpoint, or a Hugging Face folder of this shape
    share=0.5            of the mean in that; the rest is the start's (Wortsman et al., WiSE-FT)
    device=DEVICE        of fisher=true: cpu, cuda or cuda:N; default: a GPU where there is one

The weights are those of the steps, not of average.ema, which goes on from the mean; optimizer states and all else are the newest
checkpoint's. Exit code 0: DIR is complete; 2: refused, and there is no DIR.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rowwise.launch.checkpoints import Sound, candidates_of, choose_sound, examined
from rowwise.launch.evaluate import chosen
from rowwise.launch.evaluated import source_of
from rowwise.launch.runs import open_run
from rowwise.launch.settings import free_folder, parse, read_words
from rowwise.trainer.data.open import open_data
from rowwise.trainer.manifest import Manifest, find_checkpoints

if TYPE_CHECKING:
    from rowwise.trainer.data.batches import MicroBatch

STILL = ("none", "static", "nm")  # `optim.average.STILL`, without torch


@dataclass(frozen=True)
class AverageSettings:
    """The keys, as they were given."""

    run: str
    to: str
    last: Annotated[int, Field(ge=1)] | None = None
    steps: str | None = None
    fisher: bool = False
    samples: Annotated[int, Field(ge=1)] | None = None
    start: str | None = None
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    device: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Writes the mean. Returns the exit code."""
    words = read_words("rowwise average", __doc__, sys.argv[1:] if arguments is None else arguments)
    try:
        print(average(parse(AverageSettings, words, "run=runs/NAME last=5 to=DIR")))
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def average(settings: AverageSettings) -> str:
    """Writes what the keys ask for, and returns what was done, in a line. Raises ValueError."""
    _require_used(settings)
    folder, sounds = free_folder(Path(settings.to).expanduser()), _chosen(settings)
    config: Mapping[str, Any] = sounds[-1].manifest["config"]
    if (sparsity := config.get("sparsity", {}).get("name", "none")) not in STILL:
        raise ValueError(
            f"run={settings.run} has sparsity={sparsity}, whose masks move: their mean has the non-zeros of all; possible "
            f"are runs with sparsity={' or '.join(STILL)}"
        )
    adapter = config.get("adapter", {}).get("name", "none")
    for key, asked in (("fisher=true", settings.fisher), (f"start={settings.start}", settings.start is not None)):
        if asked and adapter != "none":
            raise ValueError(
                f"{key}: run={settings.run} has adapter={adapter}, whose weights are in parts; leave it out"
            )
    if settings.fisher and sparsity == "nm":
        raise ValueError("fisher=true: sparsity=nm has gradients of pruned matrices alone; give fisher=false")
    start: Sound | Path | None = None
    if settings.start is not None:
        path = Path(settings.start).expanduser()
        start = choose_sound(path, None, "start") if find_checkpoints(path) else path
    from rowwise.trainer.mean import Fisher, Start, write_mean  # torch, which no refusal above waits for
    from rowwise.trainer.whole import Source, device_named

    sources = [Source(sound.path, sound.manifest, last=True) for sound in sounds]
    fisher = None
    if settings.fisher:
        fisher = Fisher(training_samples(sounds[-1].manifest, settings.samples or 64), device_named(settings.device))
    begins = None
    if start is not None:
        where = Source(start.path, start.manifest) if isinstance(start, Sound) else start
        begins = Start(where, 0.5 if settings.share is None else settings.share)
    return write_mean(sources, folder, fisher, begins)


def training_samples(manifest: Manifest, count: int) -> "list[MicroBatch]":
    """Reads the first samples that the run of a manifest trained on, each by itself. Raises ValueError where its data has changed."""
    from rowwise.trainer.data.batches import BatchConfig, Share, step_batches

    config: Mapping[str, Any] = manifest["config"]
    seq_len = config["batch"]["seq_len"]
    data = open_data(source_of(config["data"], ()), seq_len, config["model"]["vocab_size"])
    if data.train.fingerprint != manifest["fingerprint"]["data"]:
        raise ValueError("fisher=true: the data has changed since the run read it; bring it back, or give fisher=false")
    batch = BatchConfig(global_size=count, micro_size=1, seq_len=seq_len)
    return next(step_batches(data.train, batch, config["seed"], 0, Share(), pin=False))


def _require_used(settings: AverageSettings) -> None:
    """Refuses keys that nothing would read, and both of two that say one thing."""
    if (settings.last is None) == (settings.steps is None):
        raise ValueError("give one of last=N and steps=10,20: which checkpoints of the run the mean is of")
    for key, given, needed in (
        ("share", settings.share, settings.start is not None),
        ("samples", settings.samples, settings.fisher),
        ("device", settings.device, settings.fisher),
    ):
        if given is not None and not needed:
            raise ValueError(
                f"{key}={given}: nothing reads it without {'start=PATH' if key == 'share' else 'fisher=true'}"
            )


def _chosen(settings: AverageSettings) -> list[Sound]:
    """The sound checkpoints, the newest last."""
    if settings.steps is not None:
        return sorted(chosen(open_run(settings.run), settings.steps), key=lambda sound: sound.step)
    candidates = candidates_of(settings.run, None)
    assert settings.last is not None
    if len(candidates) < settings.last:
        raise ValueError(
            f"last={settings.last}: run={settings.run} has {len(candidates)} checkpoints; give at most that, and checkpoint.keep=0 to "
            "the run so that it keeps all"
        )
    return [examined(checkpoint) for checkpoint in reversed(candidates[: settings.last])]


if __name__ == "__main__":
    sys.exit(main())
