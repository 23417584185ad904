"""One worker of a run.

    torchrun --nproc-per-node 8 -m rowwise.launch.train model=llama_1b batch.global_size=128 parallel.zero=3
    python -m rowwise.launch.train                        a run of one process

Arguments are Hydra overrides (`key=value`, `group=choice`, `experiment=name`); --cfg prints the configuration and leaves.
Exit code 2: the run was refused before it began; 1: it failed; 0: it is complete, or was asked to stop and saved.
"""

import argparse
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record

from rowwise.launch.compose import compose_tree
from rowwise.launch.outcome import clear_outcome
from rowwise.launch.workers import (
    announce,
    follow,
    hear,
    is_one_of_many_machines,
    job_id,
    keep_freed_memory,
    restarted,
    workers_from_environment,
)
from rowwise.parallel.mesh import Workers, pick_device
from rowwise.trainer.config import TrainConfig, config_from_tree, tree_of
from rowwise.trainer.prepare import lock_run, prepare
from rowwise.trainer.train import train

LEAVING_SECONDS = 60  # that a worker is given to save and leave


def main(arguments: list[str] | None = None) -> int:
    """Composes, checks and trains. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="rowwise.launch.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and leave")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)
    if options.cfg:
        return print_configuration(options.overrides)
    keep_freed_memory()
    if job_id() is not None:
        # Where torchrun is killed on one of many machines, the others restart without it: nobody waits for this one.
        follow(os.getppid(), patience_seconds=0 if is_one_of_many_machines() else LEAVING_SECONDS)
    workers = workers_from_environment()
    if workers.rank != 0:
        tree = hear(workers)
        if tree is None:
            return 2
        config = config_from_tree(tree)
        train(config, workers)
        return 0
    try:
        config = resolve(options.overrides, workers)
        lock = lock_run(Path(config.run_dir), job_id(), config.parallel.timeout_seconds + LEAVING_SECONDS)
        clear_outcome(Path(config.run_dir))
    except (ValueError, OSError) as refusal:
        announce(workers, None)
        print(f"refused: {refusal}", file=sys.stderr, flush=True)
        return 2
    try:
        announce(workers, tree_of(config))
        train(config, workers)
    finally:
        lock.release()
    return 0


def resolve(overrides: list[str], workers: Workers) -> TrainConfig:
    """On rank 0: overrides to a checked configuration. Raises ValueError."""
    pick_device(workers.local_world_size - 1)
    config = config_from_tree(compose_tree(overrides))
    if config.nproc not in (None, workers.local_world_size):
        raise ValueError(
            f"nproc={config.nproc}, but {workers.local_world_size} workers were started on this machine; leave nproc out, or "
            "let `rowwise train` start them"
        )
    if config.resume == "never" and restarted():
        config = replace(config, resume="auto")  # what this job itself has saved
    return prepare(config, workers.world_size)


def print_configuration(overrides: list[str]) -> int:
    try:
        config = config_from_tree(compose_tree(overrides))
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    print(OmegaConf.to_yaml(OmegaConf.create(tree_of(config))), end="")
    return 0


@record
def _worker() -> int:
    return main()


def run() -> None:
    """The process: ends with the exit code of `main`, at once where it failed."""
    try:
        code = _worker()
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        sys.stderr.flush()
        # Not sys.exit: threads and destructors of a broken process group can wait for peers that wait for us.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    sys.exit(code)


if __name__ == "__main__":
    run()
