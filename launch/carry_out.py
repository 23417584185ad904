"""Carries out what a command line of `rowwise train` asks for: has its workers run, and says how they ended."""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rowwise.launch import agent
from rowwise.launch.compose import compose_tree
from rowwise.launch.job import Job
from rowwise.launch.leaving import leave_report
from rowwise.launch.outcome import Outcome
from rowwise.launch.overrides import as_typed
from rowwise.launch.rendezvous import Rendezvous
from rowwise.launch.warm import Warm
from rowwise.trainer.console import Console, labelled
from rowwise.trainer.manifest import newest_sound
from rowwise.trainer.next_steps import next_steps
from rowwise.trainer.runlog import keep_said, logs_with_words

EXIT = {"complete": 0, "stopped": 0, "refused": 2, "failed": 1}


def carry_out(
    options: argparse.Namespace, typed: list[str], rendezvous: Rendezvous | None, warm: Warm | None
) -> tuple[Job, Outcome]:
    """Returns the job that was asked for, and how it ended. `typed`: the overrides of `options` before files were read. Raises
    ValueError for what is refused, Unanswered and WarmIsGone."""
    tree = compose_tree(options.overrides)
    asked = replace(job_asked_for(options, tree, rendezvous, warm), tree=tree)
    if (said := as_typed(typed)) != options.overrides:
        asked = replace(asked, command=shlex.join(["rowwise", "train", *said]))
    return asked, agent.run_workers(asked, warm)


def tell_end(asked: Job, outcome: Outcome) -> int:
    """Says how the job ended, leaves its report, and returns the exit code."""
    if outcome.state == "refused":
        print(f"refused: {outcome.reason}", file=sys.stderr)
    elif outcome.state == "failed":
        reason = f"failed at step {outcome.step}: {outcome.reason}"
        print(reason, file=sys.stderr)
        tell_of_failure(asked, reason, outcome.step)
    elif outcome.state == "stopped" and not outcome.step:
        print("stopped before the first step: there was nothing to save", file=sys.stderr)
    if asked.rendezvous is None or asked.rendezvous.host:
        leave_report(asked.run_dir, asked.report, outcome.state)
    return EXIT[outcome.state]


def job_asked_for(
    options: argparse.Namespace, tree: dict[str, Any], rendezvous: Rendezvous | None, warm: Warm | None
) -> Job:
    """Returns the job of a command line, whose overrides compose to `tree`. Raises ValueError."""
    if warm is None:
        # torch: neither help nor a mistyped key waits for it.
        from rowwise.launch.ranks import job_of

        return job_of(options, tree, rendezvous)
    names = {"overrides": options.overrides, "job": options.job, "max_restarts": options.max_restarts, "log_dir": None}
    told = warm.ask("rowwise.launch.ranks:tell_job", names, tree)
    if "refused" in told:
        raise ValueError(told["refused"])
    told["run_dir"] = Path(told["run_dir"])
    return Job(overrides=tuple(options.overrides), log_dir=options.log_dir, **told)


def tell_of_failure(asked: Job, reason: str, step: int) -> None:
    """Keeps the reason in the log of the run, and says in a box where more of it stands and how to go on."""
    run_dir = asked.run_dir
    if not run_dir.is_dir():
        return
    keep_said(run_dir, reason)
    saved = newest_sound(run_dir / "checkpoints") is not None
    own = asked.tree["model"]["own"] if asked.tree else None
    lines = [labelled("said", str(path)) for path in logs_with_words(run_dir)[:4]]
    lines += [labelled(*row) for row in next_steps(run_dir, None, writes=False, saved=saved, own=own)]
    Console(run_dir, step, asked.steps or step, log_every=1).end(f"failed at step {step}", lines)
