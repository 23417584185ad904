"""How many workers a run has on this machine, and what of it can be refused before any of them is started."""

import argparse
from pathlib import Path
from typing import Any

import torch

from rowwise.launch.forked import Telling
from rowwise.launch.job import Job
from rowwise.launch.rendezvous import Rendezvous
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree


def default_nproc() -> int:
    """Counts the workers of this machine where nproc is null: one a GPU, or one."""
    return torch.cuda.device_count() or 1


def require_ranks(nproc: int) -> None:
    """Refuses more workers than GPUs: raises ValueError where this machine has GPUs, and fewer than `nproc`: NCCL gives each worker
    one of its own."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < nproc:
        raise ValueError(f"nproc={nproc}: this machine has {gpus} GPUs; give nproc={gpus} at most, or more machines")


def job_of(options: argparse.Namespace, tree: dict[str, Any], rendezvous: Rendezvous | None) -> Job:
    """Returns the job of a command line, whose overrides compose to `tree`, checked as far as this machine can. Raises
    ValueError."""
    config = config_from_tree(tree)
    nproc = config.nproc or default_nproc()
    require_ranks(nproc)
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts {options.max_restarts}: give 0 or more")
    least, most = (rendezvous.least, rendezvous.most) if rendezvous else (1, 1)
    for nodes in {least, most}:
        check(config, nodes * nproc)
    return Job(
        tuple(options.overrides),
        Path(config.run_dir),
        config.known_steps,
        nproc,
        rendezvous,
        options.job,
        config.parallel.timeout_seconds,
        options.max_restarts,
        options.log_dir,
        torch.cuda.device_count(),
        config.report,
    )


def tell_job(tell: Telling, options: dict[str, Any], tree: dict[str, Any]) -> None:
    """Tells the fields of the job of one machine, or {"refused": why}. Of a fork, since it may touch a device."""
    try:
        job = job_of(argparse.Namespace(**options), tree, None)
    except ValueError as refusal:
        tell({"refused": str(refusal)})
        return
    names = ("run_dir", "steps", "nproc", "name", "timeout_seconds", "max_restarts", "gpus", "report")
    tell({name: getattr(job, name) for name in names} | {"run_dir": str(job.run_dir)})
