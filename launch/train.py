"""One worker of a run.

    torchrun --nproc-per-node 8 -m rowwise.launch.train model=llama_1b batch.global_size=128 parallel.zero=3
    python -m rowwise.launch.train                        a run of one process

Arguments are Hydra overrides (`key=value`, `group=choice`, `experiment=name`) and config=FILE, of more of them; --cfg prints
the configuration and leaves.
Exit code 2: the run was refused before it began; 1: it failed; 0: it is complete, or was asked to stop and saved.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import argparse
import os
import shlex
import traceback
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from rowwise.launch.compose import compose_tree
from rowwise.launch.forked import Telling, call_oneself, leave_unfinalized, use_threads
from rowwise.launch.given import Arguments, gather
from rowwise.launch.imports import uncollected
from rowwise.launch.outcome import Ended
from rowwise.launch.streams import patient_streams
from rowwise.launch.utf8 import insist_on_utf8
from rowwise.trainer.stop import INTERRUPTED, answering, end_now


def main(arguments: list[str] | None = None, tree: dict[str, Any] | None = None) -> int:
    """Composes, checks and trains. Returns the exit code. `tree`: what the overrides compose to, where that is known."""
    options = parse(arguments)
    if options.cfg:
        return print_configuration(options.overrides, "worker")
    work = imported_work()
    try:
        work(options.overrides, command_of(options), tree)
    except Ended as end:
        if _speaks() and not options.agent:
            print(f"{end.state}: {end}", file=sys.stderr, flush=True)
        return end.code
    return 0


def imported_work() -> Callable[..., None]:
    """Imports what a worker does: it needs torch, which takes seconds, and help needs none."""
    with uncollected():
        from rowwise.launch.worker import work
    return work


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Arguments("rowwise.launch.train", __doc__)
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and leave")
    parser.add_argument("--agent", action="store_true", help=argparse.SUPPRESS)  # which says how the run ended
    parser.add_argument("--command", help=argparse.SUPPRESS)  # that the agent was started by
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.read(arguments, sys.argv[1:])


def command_of(options: argparse.Namespace) -> str:
    """Says what somebody types to make the same start, on one machine."""
    if options.command is not None:
        return options.command
    starter = ["rowwise", "train"] if options.agent else ["python", "-m", "rowwise.launch.train"]
    if not options.agent and "LOCAL_WORLD_SIZE" in os.environ:
        starter = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "rowwise.launch.train"]
    return shlex.join([*starter, *options.overrides])


def print_configuration(overrides: list[str], of: str = "train") -> int:
    try:
        tree = compose_tree(gather(overrides, of))
        from rowwise.trainer.config import config_from_tree, tree_of  # torch, which no mistyped key waits for

        config = config_from_tree(tree)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    print(OmegaConf.to_yaml(OmegaConf.create(tree_of(config))), end="")
    return 0


def _speaks() -> bool:
    """Whether this worker says how the run ended: one on each of torchrun's machines, or any that was started by itself."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK") == "0"


def _interrupted(number: int, left: Callable[[float], bool]) -> None:
    """Ctrl-C before training, or after it."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted: no step is under way", file=sys.stderr, flush=True)
    end_now(left)


def work_as(tell: Telling, rank: int, arguments: list[str], tree: dict[str, Any] | None = None) -> None:
    """Runs the process of a worker that was forked."""
    tell.close()  # its end is what is heard of
    call_oneself(f"rowwise rank {rank}")
    use_threads()
    run(arguments, tree)


def run(arguments: list[str] | None = None, tree: dict[str, Any] | None = None) -> None:
    """Runs the process, which ends with the exit code of `main`, at once where it failed."""
    insist_on_utf8()
    with patient_streams():
        try:
            with answering(_interrupted):
                code = main(arguments, tree)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception:
            traceback.print_exc()
            code = 1
    if code:
        # Not sys.exit: threads and destructors of a broken process group can wait for peers that wait for us.
        os._exit(code)


if __name__ == "__main__":
    leave_unfinalized()
    run()
