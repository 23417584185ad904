"""The job that a command line of `rowwise train` asks for: how many workers, and where its machines meet."""

import argparse
from pathlib import Path
from typing import Any

from rowwise.launch.agent import Job, default_nproc, require_ranks
from rowwise.launch.meeting import Meeting, is_here, slurm_meeting, token_of
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree

LAST_PORT = 65535


def job_of(options: argparse.Namespace, tree: dict[str, Any]) -> Job:
    """The job of a command line, whose overrides compose to `tree`, checked as far as this machine can. Raises ValueError."""
    config = config_from_tree(tree)
    nproc = config.nproc or default_nproc()
    require_ranks(nproc)
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts {options.max_restarts}: give 0 or more")
    meeting = meeting_of(options)
    least, most = (meeting.least, meeting.most) if meeting else (1, 1)
    for nodes in {least, most}:
        check(config, nodes * nproc)
    return Job(
        tuple(options.overrides),
        Path(config.run_dir),
        config.known_steps,
        nproc,
        meeting,
        options.job,
        config.parallel.timeout_seconds,
        options.max_restarts,
        options.log_dir,
    )


def meeting_of(options: argparse.Namespace) -> Meeting | None:
    """Where this machine meets others: as the command line or Slurm says. Raises ValueError."""
    meeting = asked_for(options) if options.nodes or options.rendezvous else slurm_meeting(options.token)
    if meeting is None and options.token is not None:
        raise ValueError(f"--token {options.token}: of machines that meet; give --rendezvous HOST:PORT too")
    return meeting


def asked_for(options: argparse.Namespace) -> Meeting | None:
    """The meeting of --nodes and --rendezvous; None for one machine alone. Raises ValueError."""
    least, _, most = (options.nodes or "1").partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise ValueError(f"--nodes {options.nodes}: give a number of machines, or MIN:MAX")
    if int(most or least) == 1 and not options.rendezvous:
        return None
    given = f"--rendezvous {options.rendezvous}" if options.rendezvous else f"--nodes {options.nodes}"
    host, _, port = options.rendezvous.rpartition(":")
    if not (host and port.isdecimal() and 1 <= int(port) <= LAST_PORT):
        raise ValueError(
            f"{given}: several machines meet at one of them; give --rendezvous HOST:PORT, the same on each, with a port "
            f"of 1 to {LAST_PORT}"
        )
    token, here = token_of(options.token, given), is_here(host, int(port))
    return Meeting(options.rendezvous, options.job or "rowwise", int(least), int(most or least), here, token)
