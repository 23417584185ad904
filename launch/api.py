"""Rowwise from Python: compose a run, train it, read it.

    from rowwise.launch.api import compose, open_run, train

    config = compose(["model=tiny", "steps=20", "name=first"])
    train(config)
    run = open_run(config.run_dir)

In a script or a notebook `train` is a run of one process; the same script under `torchrun --nproc-per-node 8` is a run of eight,
in which every process calls `train`. See docs/python.md.
"""

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rowwise.launch.runs import Run, open_run

if TYPE_CHECKING:
    from rowwise.trainer.config import TrainConfig
    from rowwise.trainer.state import TrainState

__all__ = ["Run", "compose", "open_run", "train"]


def compose(overrides: Sequence[str] = ()) -> "TrainConfig":
    """Composes the configuration that these words make, each what `rowwise train` takes: `key=value`, `group=choice`. It is a frozen
    dataclass; `dataclasses.replace` makes another. Raises ValueError for what is unknown, or of a wrong type."""
    if isinstance(overrides, str):
        raise ValueError(f"compose({overrides!r}): give a list of words, such as [{overrides!r}]")
    from rowwise.launch.compose import compose_tree
    from rowwise.launch.given import gather
    from rowwise.trainer.config import config_from_tree

    return config_from_tree(compose_tree(gather(list(overrides))))


def train(config: "TrainConfig") -> "TrainState":
    """Trains to the last step, or until Ctrl-C asks to save and stop, and returns the numbers it ended with; what it made is in
    `config.run_dir`, with which another call goes on (`resume`). Under torchrun every process calls it, and the configuration
    is that of rank 0.

    Raises ValueError where the run is refused, before anything is made; RuntimeError where one line tells why it failed (the
    loss is not a number, the disk is full); and what else goes wrong as it is. Other ranks may then be waiting: end the
    process.
    """
    import torch.distributed as dist

    from rowwise.launch.outcome import Failed, Refused
    from rowwise.launch.parent import follow
    from rowwise.launch.worker import LEAVING_SECONDS, prepared, run
    from rowwise.launch.workers import job_id, workers_from_environment

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "train is called in another thread than the main one, which alone hears signals; call it there"
        )
    if dist.is_initialized():
        raise RuntimeError("this process has process groups already, and train makes its own; end them before it")
    if job_id() is not None:
        follow(os.getppid(), LEAVING_SECONDS)
    workers = workers_from_environment()
    try:
        return run(lambda workers: prepared(config, workers), workers)
    except Refused as refusal:
        raise ValueError(str(refusal)) from None
    except Failed as failure:
        raise RuntimeError(str(failure)) from None
    finally:
        # Of more ranks than one each ends its own: taking down a group can wait for a peer that is gone.
        if workers.world_size == 1 and dist.is_initialized():
            dist.destroy_process_group()
