"""Trials of a run with varied settings, each the work of its own workers in its own folder.

    rowwise sweep nproc=2 optim=adamw,adamw8bit optim.lr=1e-3,3e-3                 every combination, one after the other
    rowwise sweep sweep.search=grid sweep.parallel=4 nproc=2 optim.lr=1e-3,3e-3    four at a time, the hopeless ended early
    rowwise sweep sweep.search=tpe sweep.trials=50 'optim.lr=tag(log,interval(1e-4,1e-2))'         a search by Optuna
    rowwise sweep config=my.yaml optim.lr=1e-3,3e-3     what a file says, but for its name and run_dir, which a trial has of its own
    rowwise sweep hydra/launcher=slurm nproc=8 batch.global_size=64 optim.lr=1e-3,3e-3             a job of Slurm a trial

Several values are A,B or range(...); a search also takes interval(LOW,HIGH) and tag(log,interval(LOW,HIGH)). Everything else
is an argument of rowwise.launch.train, and conf/sweep.yaml has the keys of the sweep itself. Without a search it is Hydra's
multirun, with any launcher of Hydra's. The folder, sweeps/NAME, gets trial-0, trial-1, ..., sweep.csv and sweep.png. The same
command again goes on with what is not finished; a trial that fails is recorded and stops nothing.
Exit code 0: every trial has ended, or the sweep was asked to stop; 2: refused before the first.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import contextlib
import shlex
from pathlib import Path

from rowwise.launch.compose import key_of
from rowwise.launch.given import Arguments, gather
from rowwise.launch.overrides import as_typed
from rowwise.launch.streams import patient_streams
from rowwise.launch.sweep.config import keep_command, resolve
from rowwise.launch.warm import Warm, WarmIsGone, warmed


def main(arguments: list[str] | None = None) -> int:
    """Makes the trials, and returns the exit code."""
    with patient_streams():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    parser = Arguments("rowwise sweep", __doc__)
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="as Hydra's other commands have it; it is always on"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUES")
    words = parser.read(arguments, sys.argv[1:]).overrides
    # Trials that other machines or processes make begin with imports of their own.
    elsewhere = any(key_of(word) == "hydra/launcher" for word in words)
    with contextlib.nullcontext() if elsewhere else warmed() as warm:
        return _sweep(words, warm)


def _sweep(words: list[str], warm: Warm | None) -> int:
    try:
        given, words = words, gather(words, "sweep")
        config, space = resolve(words)
        folder = Path(config.folder).absolute()
        keep_command(folder, as_typed(given), anew=False)
        print(f"how the trials stand: rowwise runs {shlex.quote(config.folder)} watch=true", flush=True)
        # What makes the trials imports torch, or Optuna; neither help nor a mistyped key waits for them.
        if config.search != "none":
            from rowwise.launch.sweep.search import search

            trials = search(config, space, warm)
        else:
            from rowwise.launch.sweep.multirun import multirun

            trials = multirun(config, space, words, warm)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except WarmIsGone as gone:
        print(f"failed: {gone}", file=sys.stderr)
        return 1
    from rowwise.launch.sweep.trials import tell

    keep_command(folder, as_typed(given), anew=True)
    tell(trials, folder, config.goal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
