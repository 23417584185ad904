"""What a sweep is: its keys, what is refused before its first trial, and the plan kept in its folder."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from rowwise.launch.compose import compose_part, compose_tree, key_of
from rowwise.launch.overrides import SEARCHPATH, parse
from rowwise.launch.sweep.space import Space, overrides_of, parse_space
from rowwise.trainer.files import from_json, to_json, write_whole
from rowwise.trainer.keys import check_folder_name, without_password

OWN = ("run_dir", "name")
HYDRAS = ("hydra/launcher", "hydra.launcher", "hydra.verbose", "hydra/hydra_logging", "hydra/job_logging")
OF_A_SEARCH = {"trials", "parallel", "seed", "pruner", "factor", "storage"}
Composed = tuple[dict[str, str], dict[str, Any]]  # a trial's settings, and the tree of its run


@dataclass(frozen=True)
class SweepConfig:
    """The sweep itself; conf/sweep.yaml says what each key is."""

    name: str
    folder: str
    search: Literal["none", "grid", "random", "tpe", "gp"]
    trials: int
    parallel: int
    seed: int
    goal: Literal["eval_loss", "loss"]
    pruner: Literal["none", "halving"]
    factor: int
    storage: str | None
    max_restarts: int


def resolve(words: list[str], here: bool = True) -> tuple[SweepConfig, Space]:
    """Returns the sweep, and what is varied: all checked, also against this machine where trials run `here`. Raises ValueError."""
    keys = {word: key_of(word) for word in words}
    own = [word for word, key in keys.items() if key.startswith(("sweep.", "hydra.", "hydra/")) and key != SEARCHPATH]
    for word, key in keys.items():
        if key in OWN:
            raise ValueError(f"{word}: a sweep gives every trial its own; give sweep.name, or sweep.folder")
        if key == "resume" and parse(word).value() == "never":
            raise ValueError("resume=never: a sweep goes on with trials that were cut off; leave it out")
        if word in own and not key.startswith(("sweep.", *HYDRAS)):
            raise ValueError(f"{word}: a sweep sets this itself; of Hydra's own, {', '.join(HYDRAS)} are possible")
    config, settings = compose_part("sweep", SweepConfig, own)
    check_sweep(config, own)
    space = parse_space([word for word in words if word not in own])
    trials = compose_trials(config, space)
    from rowwise.launch.sweep.runs import check_trials  # torch, which no mistyped key waits for

    check_trials(config, settings.launcher, trials, space, here)
    return config, space


def check_sweep(config: SweepConfig, own: list[str]) -> None:
    """Refuses a sweep that cannot be made. Raises ValueError."""
    check_folder_name("sweep.name", config.name)
    for key, least in (("trials", 1), ("parallel", 1), ("factor", 2), ("max_restarts", 0)):
        if getattr(config, key) < least:
            raise ValueError(f"sweep.{key}={getattr(config, key)}: give at least {least}")
    given = {word.partition("=")[0].removeprefix("sweep.") for word in own}
    if config.search == "none" and (idle := sorted(given & OF_A_SEARCH)):
        raise ValueError(
            f"sweep.{idle[0]} is of a search; give sweep.search=grid for every combination, or random, tpe or gp"
        )
    if config.search == "grid" and given & {"trials", "seed"}:
        raise ValueError("sweep.search=grid makes every combination once; leave sweep.trials and sweep.seed out")
    if config.search != "none" and any(key.startswith("hydra") for key in given):
        raise ValueError(
            "a search starts its trials itself; leave hydra's settings out, or let several machines join it"
        )


def compose_trials(config: SweepConfig, space: Space) -> list[Composed]:
    """Composes every trial of a grid, and of a search few that try every value. Raises ValueError."""
    if not space.varied:
        raise ValueError("nothing is varied; give a key several values, such as optim.lr=1e-3,3e-3")
    trials = []
    for settings in space.grid() if config.search in ("none", "grid") else space.samples():
        with naming(settings):
            trials.append((settings, compose_tree(overrides_of(space.fixed, settings))))
    return trials


@contextlib.contextmanager
def naming(settings: dict[str, str]) -> Iterator[None]:
    """Names the trial that would be refused, in its refusal."""
    try:
        yield
    except ValueError as refusal:
        said = " ".join(f"{key}={value}" for key, value in settings.items())
        raise ValueError(f"the trial {said}: {refusal}") from None


def is_basic(launcher: DictConfig) -> bool:
    """Says whether the sweep makes one trial after the other in this process."""
    return str(launcher._target_).endswith("BasicLauncher")


def keep_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Writes what the sweep is to sweep.json. Raises ValueError where another stands there: its trials would be mixed up."""
    path = folder / "sweep.json"
    if path.exists():
        try:
            before = from_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); give another sweep.name, or remove it") from None
        if before != plan:
            before = before if isinstance(before, dict) else {}
            changed = ", ".join(key for key in plan if before.get(key) != plan[key])
            raise ValueError(f"{folder} holds another sweep ({changed} differ); give the same, or another sweep.name")
    else:
        write_whole(path, to_json(plan, indent=1) + "\n")


def keep_asked(folder: Path, trials: int, goal: str) -> None:
    """Writes to asked.json what a sweep that goes on need not agree in, and a reader must know: how many trials end it, and by
    what they are compared."""
    write_whole(folder / "asked.json", to_json({"trials": trials, "goal": goal}) + "\n")


def keep_command(folder: Path, words: list[str], anew: bool) -> None:
    """Writes the command line that goes on with the sweep to command.txt, with stars for a password. Not `anew`: only where
    no sweep is there yet, for it might be another, which this one will be refused for."""
    if anew or not (folder / "sweep.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "command.txt", shlex.join(["rowwise", "sweep", *map(without_password, words)]) + "\n")
