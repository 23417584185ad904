"""What a run would be, checked as a run checks it, without starting any of it.

    rowwise check model=llama_1b batch.global_size=128 parallel.zero=3 world_size=64
    rowwise check model=llama3_8b parallel.pipeline=4 world_size=16 picture=true        with its pipeline, and its learning rate
    rowwise check nproc=2 timing=true        starts it, in a folder that is removed, and says where the time of a start goes

Arguments are those of `rowwise train`; of its own are

    world_size=N     the workers of all machines, which need not be here (default: nproc, or one a GPU, on this machine)
    picture=true     draws the learning rate over the run, and a step of the pipeline
    timing=true      runs `rowwise train` with these arguments until its first step is made and saved, twice

The data is opened as the run would: text that has no tokens yet is tokenized, once, for the run too. Checkpoints are looked at, and
nothing is written into the run's folder. With another world_size than that of this machine, its memory and GPUs are not asked.
Exit code 0; 2: the run would be refused, and the line says why; 1: the start that was timed failed.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import re
from dataclasses import dataclass

from rowwise.launch.compose import compose_tree
from rowwise.launch.given import Arguments, gather
from rowwise.launch.own_keys import check_world_size, own_keys
from rowwise.trainer.screen import columns, flowed, holds, is_terminal, width_of, wrapped

LABEL = 11  # of the header's lines


@dataclass(frozen=True)
class Settings:
    """The keys of the command that are no keys of a run."""

    world_size: int | None = None
    picture: bool = False
    timing: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Prints, and returns the exit code."""
    parser = Arguments("rowwise check", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    words = parser.read(arguments, sys.argv[1:]).overrides
    try:
        settings, rest = own_keys(Settings, words, "world_size=64")
        check_world_size(settings.world_size)
        overrides = gather(rest)
        tree = compose_tree(overrides)
        from rowwise.launch.looking import looked  # torch, which no mistyped key waits for

        shown = looked(tree, settings.world_size, settings.picture, _columns(), holds(sys.stdout, "▁"))
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    print("\n".join(_fitted(shown.header)))
    print("\n".join(["", *_tabled(shown.table)]))
    for line in shown.pictures:
        print("\n".join(_fitted([line], hanging=2)))
    for remark in shown.remarks:
        print("\n".join(_fitted([remark])), file=sys.stderr)
    if settings.timing:
        from rowwise.launch.timing import time_starts

        return time_starts(overrides)
    return 0


def _columns() -> int:
    return max(20, width_of(sys.stdout) - 1)


def _tabled(lines: list[str]) -> list[str]:
    """A table as it is where there is room for it, else each of its rows in several lines."""
    if not is_terminal(sys.stdout) or max(map(columns, lines)) <= _columns():
        return lines
    return [part for line in lines for part in flowed(re.split(r" {2,}", line), _columns(), hanging=2)]


def _fitted(lines: list[str], hanging: int = LABEL) -> list[str]:
    """As wide as the terminal; whole where there is none, for programs that read them."""
    if not is_terminal(sys.stdout):
        return lines
    return [part for line in lines for part in wrapped(line, _columns(), hanging=hanging)]


if __name__ == "__main__":
    sys.exit(main())
