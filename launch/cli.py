"""The command `rowwise`: everything that is started from here, by name."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import importlib
import os

from rowwise.launch.utf8 import insist_on_utf8
from rowwise.trainer.files import DiskFull, want_of_room
from rowwise.trainer.stop import INTERRUPTED

COMMANDS = {
    "train": ("rowwise.launch.start", "start the workers of a run: torchrun for you"),
    "check": ("rowwise.launch.look", "what a run would be, and what refuses it, without starting it"),
    "plan": ("rowwise.launch.plan", "what a run needs of memory and time on any devices, and what would fit them"),
    "measure": (
        "rowwise.launch.measure",
        "what this machine does, timed and kept for `plan`: products, links, host, disk",
    ),
    "doctor": ("rowwise.launch.doctor", "what this machine has of what runs need, and what mends what is amiss"),
    "sweep": ("rowwise.launch.sweep.__main__", "many runs with varied settings, or a search"),
    "runs": ("rowwise.launch.listing", "every run and sweep below a folder: how it stands, and what goes on with it"),
    "report": ("rowwise.launch.report", "one page about one or several runs"),
    "export": ("rowwise.launch.export", "a run's model as Hugging Face safetensors"),
    "convert": ("rowwise.launch.convert", "a checkpoint of DeepSpeed as one of a run, and back"),
    "average": ("rowwise.launch.average", "the mean of a run's checkpoints, as a run of its own"),
    "generate": ("rowwise.launch.generate", "text from a run's model"),
    "evaluate": ("rowwise.launch.evaluate", "loss, perplexity and bits per byte of a run on a text"),
    "tokenize": ("rowwise.launch.token_files", "text as files of tokens, by many processes, once for many runs"),
    "schedule": ("rowwise.launch.schedule", "a pipeline schedule's table and picture"),
    "slurm": ("rowwise.launch.slurm", "a batch script for a run or a sweep"),
}
EXAMPLES = """\
  rowwise train nproc=8 model=llama_1b batch.global_size=128 optim=adamw8bit parallel.zero=3 steps=1000
  rowwise check model=llama_1b batch.global_size=128 parallel.zero=3 world_size=64
  rowwise plan fit=true model=llama3_8b batch.global_size=128 precision=bf16 world_size=64 device=h100
  rowwise measure folder=/mnt/nvme
  rowwise doctor to=doctor.txt
  rowwise train config=my.yaml steps=1000
  rowwise train resume=runs/NAME steps=2000
  rowwise sweep nproc=2 optim=adamw,adamw8bit optim.lr=1e-3,3e-3
  rowwise sweep sweep.search=tpe sweep.parallel=4 nproc=2 'optim.lr=tag(log,interval(1e-4,1e-2))'
  rowwise slurm train nproc=8 slurm.nodes=4 slurm.time=24:00:00 model=llama3_8b batch.global_size=256 submit=true
  rowwise runs watch=true
  rowwise report run=runs/NAME
  rowwise export run=runs/NAME to=DIR
  rowwise convert from=CHECKPOINTS to=runs/NAME model=llama_1b optim=adamw batch.global_size=128 steps=2000
  rowwise average run=runs/NAME last=5 to=runs/NAME-mean
  rowwise generate run=runs/NAME prompt='def main('
  rowwise evaluate run=runs/NAME steps=all data=text data.files=other.txt
  rowwise tokenize data=text data.files=wiki data.tokenizer=tokenizer.json to=tokens nproc=16
  rowwise schedule zb_v ranks=4 micro_batches=12 to=zb_v.png
"""


def main(arguments: list[str] | None = None) -> int:
    """Hands over to the command's own `main`, and returns its exit code: 0, 1 where it failed, 2 where it was refused."""
    if arguments is None:
        insist_on_utf8()
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(described())
        return 0
    if words[0] == "--version":
        from rowwise.launch.doctor import versions_told  # what it stands beside is not small

        print(versions_told())
        return 0
    if words[0] not in COMMANDS:
        print(f"refused: {words[0]} is no command: possible are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `rowwise ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (cause := want_of_room(error)) is None:
            raise
        print(f"failed: {cause if isinstance(cause, DiskFull) else f'disk full: {cause}'}", file=sys.stderr)
        return 1


def described() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: rowwise COMMAND ...", "", *lines, "", "examples:", EXAMPLES, "`rowwise COMMAND --help` says more."]
    )


if __name__ == "__main__":
    sys.exit(main())
