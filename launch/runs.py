"""One run, read as a value: its configuration, records and checkpoints, and the model of a step, whole.

    from rowwise.launch.runs import open_run

    run = open_run("runs/first")
    run.step, run.standing.state                    200, "complete"
    run.settings["optim"]["lr"]                     of config.yaml, as plain values; run.config is the TrainConfig
    run.table("step", "loss")                       columns: plot them, or pandas.DataFrame(run.table())
    run.checkpoints                                 (Checkpoint(step=100, ...), Checkpoint(step=200, ...))
    model = run.model(100)                          a torch.nn.Module with every weight, on one process
    "".join(run.writer().write("def "))             what it writes

Reads what is on disk now, also while the run goes on. Needs no torch until a model, a writer or the TrainConfig is asked for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rowwise.launch.checkpoints import Weights, candidates_of, choose_sound, means_last
from rowwise.launch.settings_file import read_settings
from rowwise.launch.standing import Standing, of_run
from rowwise.trainer.data.own_tokenizer import tokenizer_of_run
from rowwise.trainer.manifest import complete_checkpoints, find_checkpoints, step_of
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.code import check_code

if TYPE_CHECKING:
    import torch

    from rowwise.trainer.config import TrainConfig
    from rowwise.trainer.generate import Writer
    from rowwise.trainer.models.decoder import Decoder

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, sound or not: `model` and `writer` compare it with its checksums."""

    step: int
    path: Path


@dataclass(frozen=True)
class Run:
    """The run in `folder`. `given`: what was asked for, that folder or a checkpoint of it. `own`: the code of its model, where that is
    somebody's own."""

    folder: Path
    given: Path
    own: str | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain values, by group and key. Raises ValueError where config.yaml is none."""
        path = self.folder / CONFIG
        if not path.is_file():  # a checkpoint that stands alone
            return dict(choose_sound(self.given, None).manifest["config"])
        return read_settings(path, str(path))

    @property
    def config(self) -> "TrainConfig":
        """The configuration as its dataclasses. Raises ValueError where it is of another release, and where nothing but code that it
        names could say what its learning rate is."""
        from rowwise.trainer.config import config_from_tree

        settings = self.settings
        refuse_code(settings)
        return config_from_tree(settings)

    @property
    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl has, a record a step."""
        return read_metrics(self.folder)

    def table(self, *names: str) -> dict[str, list[Any]]:
        """Returns the records as columns of one length, those of `names` or all; None where a step has no such number. Raises
        ValueError for a name that no record has."""
        records = self.records
        known = list(dict.fromkeys(name for record in records for name in record))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no record of {self.folder} has {', '.join(unknown)}; possible are {', '.join(known)}")
        return {name: [record.get(name) for record in records] for name in names or known}

    @property
    def step(self) -> int:
        """The last step that is recorded; 0 before the first."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def standing(self) -> Standing:
        """How the run stands, as `rowwise runs` says it: its `state` (running, complete, stopped, failed, ...), the `reason`, the
        time left, its size, and the command that goes on with it."""
        return of_run(self.folder)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The complete checkpoints, the oldest first."""
        found = complete_checkpoints(self.folder / "checkpoints")
        return tuple(Checkpoint(step_of(path), path) for path in reversed(found))

    def model(
        self,
        step: int | None = None,
        device: str | None = None,
        dtype: "torch.dtype | None" = None,
        weights: Weights | None = None,
    ) -> "Decoder":
        """Returns the model of a step (None: of the newest sound checkpoint), whole, whatever layout it was trained on: an nn.Module
        that does not learn, `model(tokens, positions)` (B, S) to logits (B, S, V). `device`: `cpu`, `cuda`, `cuda:N`; None: a GPU
        where there is one. `dtype`: None: what the run computed in. `weights`: `average` or `last`; None: the average
        where there is one. Raises ValueError."""
        sound = choose_sound(self.given, step_key(step), "step")
        last = means_last(sound.manifest, weights)
        from rowwise.trainer.whole import Source, device_named, load_model

        return load_model(Source(sound.path, sound.manifest, last, self.own), device_named(device), dtype)

    def writer(
        self,
        step: int | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        weights: Weights | None = None,
        chat: bool = False,
    ) -> "Writer":
        """Returns the model of a step, as `model` does, with its tokenizer, to write with. `tokenizer`: of a run that read
        tokens, the path of the tokenizer.json that made them, or `bytes`. `chat`: it is to have a chat template. Raises
        ValueError."""
        sound = choose_sound(self.given, step_key(step), "step")
        config, last = sound.manifest["config"], means_last(sound.manifest, weights)
        own = tokenizer_of_run(sound.manifest, tokenizer, chat=chat)
        if own is None:
            raise ValueError(
                f"the run has no tokenizer to write with (data={config['data']['name']}); give tokenizer=PATH of the "
                "tokenizer.json that made its tokens, or tokenizer=bytes"
            )
        from rowwise.trainer.generate import Writer
        from rowwise.trainer.whole import Source, device_named, load_model

        source = Source(sound.path, sound.manifest, last, self.own)
        model = load_model(source, device_named(device))
        return Writer(model, own.tokenizer, config["batch"]["seq_len"], own.end_token, source.tf32)


def refuse_code(settings: dict[str, Any]) -> None:
    """Refuses settings, which no command gave, of which the learning rate would have code run. Raises ValueError."""
    model, optim = settings.get("model"), settings.get("optim")
    if (
        isinstance(model, dict)
        and isinstance(optim, dict)
        and model.get("own") is not None
        and optim.get("lr", 0) is None
    ):
        raise ValueError(
            f"optim.lr=null with model.own={model['own']}: no run writes that; its code is not run for a rate"
        )


def step_key(step: int | None) -> str | None:
    return None if step is None else str(step)


def open_run(path: str | Path, model: str | None = None) -> Run:
    """Opens the run in a folder, or that of a checkpoint. `model`: the code of its model, FILE.py:NAME or package.module:NAME, where
    that is somebody's own (docs/own-model.md). Raises ValueError where there is none."""
    if model is not None:
        check_code(model)
    given = Path(path).expanduser()
    if (given / CONFIG).is_file() or (given / "metrics.jsonl").is_file():
        return Run(given, given, model)
    if find_checkpoints(given) == [given]:
        return Run(given.resolve().parent.parent, given, model)
    candidates_of(path, None)
    return Run(given, given, model)
