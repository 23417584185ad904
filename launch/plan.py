"""What a run needs of memory and time, on devices that need not be here: without workers, GPUs or data.

    rowwise plan model=llama3_8b batch.global_size=128 batch.micro_size=2 precision=bf16 parallel.zero=3 world_size=64 device=h100
    rowwise plan fit=true model=llama3_70b batch.global_size=512 batch.seq_len=8192 precision=bf16 world_size=64 device=h100
    rowwise plan model=llama_1b precision=bf16 device=mine.yaml to=plan.png

Arguments are those of `rowwise train`; of its own are

    world_size=N     the workers of all machines (default: nproc, or one a GPU, on this machine)
    device=NAME      h100, h200, a100_40, a100_80, b200, rtx4090, rtx3090, cpu, here (as `rowwise measure` timed this machine), or
                     a YAML of one of your own: memory, flops, bandwidth, link, network, host, disk, disk_read, step, ram,
                     per_machine (default: this machine as it was timed, or else its GPUs, or cpu)
    device.KEY=N     another figure of that device: device.host_bandwidth=25e9
    fit=true         searches layouts and memory options for the fastest that fits; what is given here stays as it is
    to=FILE.png      draws what each place of the pipeline holds (.png or .svg)

Bytes are those of the step, by category, at most; seconds are an estimate. What the figures stand on is told in docs/planning.md.
Exit code 0; 1: it does not fit; 2: the run would be refused, and the line says why.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

from dataclasses import dataclass
from pathlib import Path

from rowwise.launch.compose import compose_tree
from rowwise.launch.given import Arguments, gather
from rowwise.launch.own_keys import check_world_size, own_keys
from rowwise.trainer.plan.devices import OF_DEVICE, device_named, with_figures


@dataclass(frozen=True)
class Settings:
    """What is no key of a run."""

    world_size: int | None = None
    device: str | None = None
    fit: bool = False
    to: str | None = None


FORMATS = (".png", ".svg")


def main(arguments: list[str] | None = None) -> int:
    """Prints what a run needs, and returns the exit code."""
    parser = Arguments("rowwise plan", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    words = parser.read(arguments, sys.argv[1:]).overrides
    try:
        figures = [word for word in words if word.startswith(OF_DEVICE)]
        settings, overrides = own_keys(
            Settings, [word for word in words if word not in figures], "world_size=64 device=h100"
        )
        check_settings(settings, figures)
        overrides = gather(overrides)
        tree = compose_tree(overrides)
        from rowwise.launch.planned import planned  # torch, which no mistyped key waits for

        device = settings.device, figures
        lines, fits = planned(tree, overrides, settings.world_size, device, settings.fit, settings.to)
    except ValueError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if fits else 1


def check_settings(settings: Settings, figures: list[str]) -> None:
    """Refuses what needs no torch to be seen. Raises ValueError."""
    check_world_size(settings.world_size)
    with_figures(device_named(settings.device or "cpu"), figures)
    if settings.to is not None and (
        Path(settings.to).suffix not in FORMATS or not Path(settings.to).expanduser().parent.is_dir()
    ):
        raise ValueError(
            f"to={settings.to}: give the name of a file that ends in {', '.join(FORMATS)}, in a folder that is there"
        )


if __name__ == "__main__":
    sys.exit(main())
