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
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from rowwise.launch import agent
from rowwise.launch.compose import compose_tree
from rowwise.launch.given import Arguments, as_typed, gather
from rowwise.launch.job import Job
from rowwise.launch.leaving import leave_report
from rowwise.launch.meeting import Meeting, meeting_of
from rowwise.launch.parent import follow
from rowwise.launch.streams import patient_streams
from rowwise.launch.train import print_configuration
from rowwise.launch.utf8 import insist_on_utf8
from rowwise.launch.warm import Unanswered, Warm, WarmIsGone, warmed
from rowwise.trainer.console import Console, labelled
from rowwise.trainer.manifest import newest_sound
from rowwise.trainer.next_steps import next_steps
from rowwise.trainer.runlog import keep_said, logs_with_words

EXIT = {"complete": 0, "stopped": 0, "refused": 2, "failed": 1}


def main(arguments: list[str] | None = None) -> int:
    """Starts, watches, and returns the exit code."""
    with patient_streams():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    options = parse(arguments)
    if options.cfg:
        return print_configuration(options.overrides)
    if options.parent:
        follow(options.parent)
    try:
        typed, options.overrides = options.overrides, gather(options.overrides)
        meeting = meeting_of(options)
        # A warm process imports torch, which takes seconds, while this composes.
        with contextlib.nullcontext() if meeting else warmed(options.warm) as warm:
            tree = compose_tree(options.overrides)
            asked = replace(job_asked_for(options, tree, meeting, warm), tree=tree)
            if (said := as_typed(typed)) != options.overrides:
                asked = replace(asked, command=shlex.join(["rowwise", "train", *said]))
            outcome = agent.run_workers(asked, warm)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    except (Unanswered, WarmIsGone) as gone:
        print(f"failed: {gone}", file=sys.stderr)
        return 1
    if outcome.state == "refused":
        print(f"refused: {outcome.reason}", file=sys.stderr)
    elif outcome.state == "failed":
        reason = f"failed at step {outcome.step}: {outcome.reason}"
        print(reason, file=sys.stderr)
        tell_of_failure(asked.run_dir, reason, outcome.step, asked.steps or outcome.step)
    elif outcome.state == "stopped" and not outcome.step:
        print("stopped before the first step: there was nothing to save", file=sys.stderr)
    if asked.meeting is None or asked.meeting.host:
        leave_report(asked.run_dir, asked.report, outcome.state)
    return EXIT[outcome.state]


def job_asked_for(options: argparse.Namespace, tree: dict[str, Any], meeting: Meeting | None, warm: Warm | None) -> Job:
    """The job of a command line, whose overrides compose to `tree`. Raises ValueError."""
    if warm is None:
        # torch: neither help nor a mistyped key waits for it.
        from rowwise.launch.ranks import job_of

        return job_of(options, tree, meeting)
    names = {"overrides": options.overrides, "job": options.job, "max_restarts": options.max_restarts, "log_dir": None}
    told = warm.ask("rowwise.launch.ranks:tell_job", names, tree)
    if "refused" in told:
        raise ValueError(told["refused"])
    told["run_dir"] = Path(told["run_dir"])
    return Job(overrides=tuple(options.overrides), log_dir=options.log_dir, **told)


def tell_of_failure(run_dir: Path, reason: str, step: int, steps: int) -> None:
    """Keeps the reason in the log of the run, and says in a box where more of it stands and how to go on."""
    if not run_dir.is_dir():
        return
    keep_said(run_dir, reason)
    saved = newest_sound(run_dir / "checkpoints") is not None
    lines = [labelled("said", str(path)) for path in logs_with_words(run_dir)[:4]]
    lines += [labelled(*row) for row in next_steps(run_dir, None, writes=False, saved=saved)]
    Console(run_dir, step, steps, log_every=1).end(f"failed at step {step}", lines)


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
