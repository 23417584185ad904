"""A checkpoint of DeepSpeed as one of a run, and back.

    rowwise convert from=CHECKPOINTS to=runs/NAME model=llama_1b optim=adamw batch.global_size=128 steps=2000
    rowwise train resume=runs/NAME          goes on from there, on any layout and with any backend

    python -m rowwise.launch.convert from=runs/NAME to=DIR          the other way

    from=PATH            what DeepSpeed saved under ZeRO 1, 2 or 3 (the folder with `latest`, or one checkpoint in it), or its
                         universal checkpoint (with `latest_universal`); or a run of ours, or a checkpoint of it
    to=DIR               the folder to make; it must not exist, or be empty

From DeepSpeed, DIR is a run with one checkpoint: parameters in full precision, AdamW's moments (or Lion's), steps, loss scale,
position in the data. What else the run is, the other arguments say, as for `rowwise train`; of them the model, the optimizer and
the data order must be what the script had. Names of parameters are ours, or those of transformers.

    world_size=N         the workers that it will go on with (default: nproc, or one a GPU)

From a run of AdamW, DIR is a universal checkpoint, which a script of DeepSpeed with "checkpoint": {"load_universal": true} loads by
`engine.load_checkpoint(DIR)` at any stage of ZeRO, on any number of ranks. Its schedule is told the steps, its groups are given
learning rate, betas and eps; their weight decay stays.

    step=STEP            the checkpoint, by step or path; default: the newest whose checksums are right
    names=huggingface    of its parameters: huggingface (transformers' Llama, Qwen3), or rowwise
    adam=torch           of that script, which counts its steps otherwise: torch (torch.optim.AdamW), or deepspeed (FusedAdam,
                         DeepSpeedCPUAdam). At stage 3 DeepSpeed lets all groups count by one tensor, so that torch's count too
                         fast where there are several: have DeepSpeed's there

Exit code 0: DIR is complete; 2: refused, and there is no DIR. It gets its name last: what a killed one leaves behind
is DIR.incomplete, which the next one removes. DeepSpeed itself is not needed, and nothing of its pickles is run.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

from dataclasses import dataclass
from pathlib import Path

from rowwise.launch.checkpoints import choose_sound
from rowwise.launch.compose import compose_tree, key_of
from rowwise.launch.given import Arguments, gather
from rowwise.launch.overrides import quoted
from rowwise.launch.own_keys import check_world_size, own_keys
from rowwise.launch.settings import free_folder
from rowwise.trainer.convert.find import Found, find

POSSIBLE = {"names": ("huggingface", "rowwise"), "adam": ("torch", "deepspeed")}


@dataclass(frozen=True)
class Settings:
    """The keys of the command that are no keys of a run; None: not given."""

    from_: str
    to: str
    world_size: int | None = None
    step: str | None = None
    names: str | None = None
    adam: str | None = None


OF_OURS = ("step", "names", "adam")  # keys of one direction alone


def main(arguments: list[str] | None = None) -> int:
    """Converts. Returns the exit code."""
    parser = Arguments("rowwise convert", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    words = parser.read(arguments, sys.argv[1:]).overrides
    try:
        settings, rest = own_keys(Settings, words, "from=PATH to=DIR")
        done, remarks = convert(settings, rest)
    except ValueError as refusal:
        print(_printable(f"refused: {refusal}"), file=sys.stderr)
        return 2
    for remark in remarks:
        print(_printable(remark), file=sys.stderr)
    print(done)
    return 0


def _printable(line: str) -> str:
    """Without what a terminal would obey: names in a checkpoint are whoever's made it."""
    return "".join(character if character.isprintable() else "?" for character in line)


def convert(settings: Settings, rest: list[str]) -> tuple[str, list[str]]:
    """Converts what the keys name; `rest`: overrides of the run. Returns what was done, in a line, and what is to be known.
    Raises ValueError."""
    for key, possible in POSSIBLE.items():
        if getattr(settings, key) not in (None, *possible):
            raise ValueError(f"{key}={getattr(settings, key)}: possible are {', '.join(possible)}")
    check_world_size(settings.world_size)
    folder, found = free_folder(Path(settings.to).expanduser()), find(settings.from_)
    if found.form == "ours":
        return _to_deepspeed(settings, rest, folder), []
    return _from_deepspeed(found, settings, rest, folder)


def _to_deepspeed(settings: Settings, rest: list[str], folder: Path) -> str:
    if rest or settings.world_size is not None:
        given = rest[0] if rest else f"world_size={settings.world_size}"
        raise ValueError(f"{given}: from={settings.from_} is a run, whose checkpoints say what it is; leave it out")
    chosen = choose_sound(settings.from_, settings.step, "step")
    from rowwise.trainer.convert.universal import Script, write_universal  # torch, which no refusal above waits for
    from rowwise.trainer.whole import Source

    script = Script(settings.names or "huggingface", settings.adam or "torch")
    return write_universal(Source(chosen.path, chosen.manifest), folder, script)


def _from_deepspeed(found: Found, settings: Settings, rest: list[str], folder: Path) -> tuple[str, list[str]]:
    for key in OF_OURS:
        if getattr(settings, key) is not None:
            raise ValueError(
                f"{key}={getattr(settings, key)}: it is for runs of ours, and {found.folder} is DeepSpeed's; leave it out"
            )
    for word in rest:
        if key_of(word) in ("resume", "run_dir"):
            raise ValueError(f"{word}: the run begins with what is converted, in to={settings.to}; leave it out")
    tree = compose_tree(gather([*rest, f"run_dir={quoted(str(folder))}"]))
    from rowwise.launch.converting import converted  # torch, which no refusal above waits for

    return converted(found, tree, settings.world_size, folder)


if __name__ == "__main__":
    sys.exit(main())
