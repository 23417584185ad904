"""Trials of a run with varied settings, each the work of its own workers in its own folder.

    rowwise sweep nproc=2 optim=adamw,adamw8bit optim.lr=1e-3,3e-3                  every combination, one after the other
    rowwise sweep sweep.search=grid sweep.parallel=4 nproc=2 optim.lr=1e-3,3e-3     four at a time, the hopeless ended early
    rowwise sweep sweep.search=tpe sweep.trials=50 'optim.lr=tag(log,interval(1e-4,1e-2))'          a search by Optuna
    rowwise sweep hydra/launcher=slurm hydra.launcher.gpus_per_node=8 nproc=8 optim.lr=1e-3,3e-3    a job of Slurm a trial

Several values are A,B or range(...); a search also takes interval(LOW,HIGH) and tag(log,interval(LOW,HIGH)). Everything else
is an argument of rowwise.launch.train, and conf/sweep.yaml has the keys of the sweep itself. Without a search it is Hydra's
multirun, with any launcher of Hydra's. The folder, sweeps/NAME, gets trial-0, trial-1, ..., sweep.csv and sweep.png. The same
command again goes on with what is not finished; a trial that fails is recorded and stops nothing.
Exit code 0: every trial has ended, or the sweep was asked to stop; 2: refused before the first.
"""

import argparse
import sys
from pathlib import Path

from rowwise.launch.compose import compose_part
from rowwise.launch.sweep.config import SweepConfig, check_sweep, check_trials
from rowwise.launch.sweep.multirun import multirun
from rowwise.launch.sweep.space import Space, parse_space
from rowwise.launch.sweep.trials import Trial, draw, row_of, write_table

OWN = ("run_dir", "name")


def main(arguments: list[str] | None = None) -> int:
    """Makes the trials, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rowwise sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="as Hydra's other commands have it; it is always on"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUES")
    words = parser.parse_args(arguments).overrides
    try:
        config, space = resolve(words)
        if config.search != "none":
            from rowwise.launch.sweep.search import search  # Optuna

            trials = search(config, space)
        else:
            trials = multirun(config, space, words)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    tell(trials, config)
    return 0


def resolve(words: list[str]) -> tuple[SweepConfig, Space]:
    """The sweep, and what is varied: all checked. Raises ValueError."""
    keys = {word: word.partition("=")[0].lstrip("+~") for word in words}
    own = [word for word, key in keys.items() if key.startswith(("sweep.", "hydra.", "hydra/"))]
    for word, key in keys.items():
        if key in OWN:
            raise ValueError(f"{word}: a sweep gives every trial its own; give sweep.name, or sweep.folder")
        if key in ("hydra/sweeper", "hydra.sweep.dir", "hydra.sweep.subdir"):
            raise ValueError(f"{word}: this sweep has its own; give sweep.search, sweep.name or sweep.folder")
    config, settings = compose_part("sweep", SweepConfig, own)
    check_sweep(config, own)
    space = parse_space([word for word in words if word not in own])
    check_trials(config, settings.launcher, space)
    return config, space


def tell(trials: list[Trial], config: SweepConfig) -> None:
    """Writes the table and the picture, and says how it went."""
    folder = Path(config.folder).absolute()
    path, picture = write_table(trials, folder), draw(trials, folder, config.goal)
    rows = [row_of(trial) for trial in trials]
    for row, trial in zip(rows, trials, strict=True):
        value = "" if row[config.goal] is None else f"{config.goal} {row[config.goal]:.4f}"
        print(f"trial-{row['trial']}  {row['state']:<10} {value:<18} {trial.said}  {row['reason'] or ''}".rstrip())
    print(f"written: {path}, {picture}")


if __name__ == "__main__":
    sys.exit(main())
