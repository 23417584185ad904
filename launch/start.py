"""torchrun for you: starts the workers of a run on this machine, and watches them.

    rowwise train nproc=8 model=llama_1b batch.global_size=128 parallel.zero=3 steps=1000
    rowwise train config=my.yaml steps=1000                a YAML of KEY: VALUE, or a run's config.yaml; what stands behind wins
    rowwise train resume=runs/NAME steps=2000              goes on with all that the run was started with, but for steps
    rowwise train --config-dir DIR optim=mine              DIR/optim/mine.yaml is one more choice
    rowwise train --max-restarts 3 nproc=8 ...             begins again from the newest checkpoint when a worker dies
    rowwise train --nodes 2 --rendezvous host1:29400 --token FILE nproc=8 ...      the same command on each of two machines
    rowwise train --nodes 1:4 --rendezvous host1:29400 --token FILE --job big ...  goes on with fewer when machines are lost
    srun --ntasks-per-node=1 rowwise train --token FILE nproc=8 ...     in a job of Slurm the machines find each other

Arguments are those of rowwise.launch.train. SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 and SIGUSR2 end the run after its step,
saved. The run goes on where nobody reads what it prints.
Exit code 0: the run is complete, or was asked to stop and saved; 2: it was refused before it began; 1: it failed.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import argparse
import contextlib
from pathlib import Path

from rowwise.launch.given import Arguments, gather
from rowwise.launch.parent import follow
from rowwise.launch.rendezvous import rendezvous_of
from rowwise.launch.streams import patient_streams
from rowwise.launch.utf8 import insist_on_utf8
from rowwise.launch.warm import Unanswered, WarmIsGone, warmed


def main(arguments: list[str] | None = None) -> int:
    """Starts, watches, and returns the exit code."""
    with patient_streams():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    options = parse(arguments)
    if options.cfg:
        from rowwise.launch.train import print_configuration

        return print_configuration(options.overrides)
    if options.parent:
        follow(options.parent)
    try:
        typed, options.overrides = options.overrides, gather(options.overrides)
        rendezvous = rendezvous_of(options)
        # A warm process imports torch, which takes seconds, while this one imports the rest and composes.
        with contextlib.nullcontext() if rendezvous else warmed(options.warm) as warm:
            from rowwise.launch.carry_out import carry_out, tell_end

            ended = carry_out(options, typed, rendezvous, warm)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except (Unanswered, WarmIsGone) as gone:
        print(f"failed: {gone}", file=sys.stderr)
        return 1
    return tell_end(*ended)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Arguments("rowwise train", __doc__)
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and leave")
    parser.add_argument("--nodes", default="", metavar="N | MIN:MAX", help="machines of the run (default: 1)")
    parser.add_argument("--rendezvous", default="", metavar="HOST:PORT", help="where they meet: one of them")
    parser.add_argument("--token", type=Path, metavar="FILE", help="holds what only machines of the job know")
    parser.add_argument("--job", help="the name under which they meet (default: rowwise)")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="of all workers, when one dies")
    parser.add_argument("--log-dir", type=Path, help="writes what each worker says there, not here")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)  # a sweep, whose end is ours
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)  # the file descriptor of what forks the workers
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.read(arguments, sys.argv[1:])


if __name__ == "__main__":
    insist_on_utf8()
    sys.exit(main())
