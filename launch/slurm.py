"""A batch script for Slurm: the run saves before its time is up, and goes on in the next job.

    rowwise slurm train model=llama_1b batch.global_size=128 slurm.nodes=2 slurm.gpus_per_node=8 slurm.time=1-00:00:00
    rowwise slurm sweep sweep.search=tpe nproc=1 'optim.lr=interval(1e-4,1e-2)' slurm.workers=4 to=sweep.sh

Arguments are those of the run or the sweep, and slurm.KEY=VALUE (conf/slurm.yaml says which). What the run would refuse
is refused here. The script is printed, to be read and changed; or

    to=FILE                                it is written there
    submit=true                            it is handed to sbatch, and the job's id printed

Exit code 0: all is printed, written or submitted; 2: refused.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` puts the working directory there, before its modules and all others

import re
import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator

from rowwise.launch.compose import compose_part, compose_tree, key_of
from rowwise.launch.given import Arguments, gather
from rowwise.launch.overrides import SEARCHPATH
from rowwise.launch.rendezvous import TOKEN
from rowwise.launch.sweep.config import SweepConfig
from rowwise.launch.sweep.config import resolve as resolve_sweep
from rowwise.launch.sweep.space import overrides_of
from rowwise.trainer.keys import without_password

if TYPE_CHECKING:
    from rowwise.trainer.config import TrainConfig

PROGRAMS = {"train": "rowwise.launch.start", "sweep": "rowwise.launch.sweep"}
# A partition may be called 7; and slurm.mem=4000 is no mistake.
Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


@dataclass(frozen=True)
class SlurmConfig:
    """What the cluster is asked for. None: nothing, the cluster decides."""

    name: Text | None
    nodes: int
    gpus_per_node: int | None
    cpus_per_task: int | None
    mem: Text | None
    time: Text | None
    partition: Text | None
    account: Text | None
    qos: Text | None
    constraint: Text | None
    signal_seconds: int
    requeue: bool
    workers: int
    extra: list[str]
    setup: list[str]
    python: str | None
    log: str | None


def main(arguments: list[str] | None = None) -> int:
    """Prints, writes or submits the script. Returns the exit code."""
    parser = Arguments("rowwise slurm", __doc__)
    parser.add_argument("program", choices=list(PROGRAMS))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.read(arguments, sys.argv[1:])
    try:
        print(hand_out(options.program, options.overrides))
    except (ValueError, OSError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def hand_out(program: str, words: list[str]) -> str:
    """Does with the script what `words` ask; returns what there is to print. Raises ValueError."""
    own = [word for word in words if word.startswith(("to=", "submit="))]
    ways = dict(word.split("=", 1) for word in own)
    if len(ways) < len(own) or "" in ways.values() or ways.get("submit") not in ("true", "false", None):
        raise ValueError(f"{' '.join(own)}: give to=FILE and submit=true, each once")
    given = gather([word for word in words if word not in own], program)
    ours = [word for word in given if key_of(word).startswith("slurm.")]
    overrides = [word for word in given if word not in ours]
    config, command = resolve(program, overrides, compose_slurm(ours))
    text = script(config, command)
    if "to" in ways:
        Path(ways["to"]).expanduser().write_text(text)
    if ways.get("submit") == "true":
        return submit(text)
    return f"written; submit it with: sbatch {shlex.quote(ways['to'])}" if "to" in ways else text.rstrip("\n")


def compose_slurm(overrides: list[str]) -> SlurmConfig:
    """Composes conf/slurm.yaml with these overrides, checked. Raises ValueError."""
    config, _ = compose_part("slurm", SlurmConfig, overrides)
    check_slurm(config)
    return config


def check_slurm(config: SlurmConfig) -> None:
    """Refuses what sbatch would refuse, misread, or take and never save in time."""
    for key in ("nodes", "gpus_per_node", "cpus_per_task", "workers"):
        if (count := getattr(config, key)) is not None and count < 1:
            raise ValueError(f"slurm.{key}={count}: it is at least 1" + ("" if key == "nodes" else ", or leave it out"))
    if not 1 <= config.signal_seconds <= 65535:
        raise ValueError(f"slurm.signal_seconds={config.signal_seconds}: Slurm takes 1 to 65535")
    if config.mem is not None and not re.fullmatch(r"\d+[KMGT]?", config.mem):
        raise ValueError(f"slurm.mem={config.mem}: give a whole number with K, M, G or T, such as 64G")
    if config.time is not None and limit_seconds(config.time) <= config.signal_seconds:
        raise ValueError(
            f"slurm.time={config.time} is not above slurm.signal_seconds={config.signal_seconds}: the run would be told to "
            "leave as soon as it has begun; give more time, or fewer seconds"
        )
    for option in config.extra:
        if not option.startswith("-"):
            raise ValueError(f"slurm.extra: {option!r} is no option of sbatch; give one such as --exclusive")


def limit_seconds(time: str) -> int:
    """Returns the seconds of a time limit. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)", time)
    if match is None:
        raise ValueError(f"slurm.time={time}: give D-HH:MM:SS or HH:MM:SS, such as 1-12:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def resolve(program: str, overrides: list[str], config: SlurmConfig) -> tuple[SlurmConfig, list[str]]:
    """Returns the configuration with the names it leaves to the run, and the command of one node. Raises ValueError for what
    the run, or a trial of the sweep, would refuse on its nodes, as far as that can be known here."""
    for word in overrides:
        if (told := without_password(word)) != word:
            key = key_of(word)
            way = (
                "leave it out, and have slurm.setup give the URI as MLFLOW_TRACKING_URI, from a file that you alone can read"
                if key == "tracker.uri"  # what the run would look up stands in its config.yaml
                else f"give {key}='${{oc.env:NAME}}', which is looked up on the node"
            )
            raise ValueError(f"{told}: others can read a batch script, and this would hold a password; {way}")
    if program == "train" and config.workers > 1:
        raise ValueError(f"slurm.workers={config.workers}: jobs join a sweep, not a run; give slurm.nodes")
    at_once = trials_at_once(overrides, config) if program == "sweep" else 1
    varies_nproc = any(key_of(word) == "nproc" for word in overrides)
    if config.gpus_per_node is not None and not varies_nproc:
        overrides = [*overrides, f"nproc={max(1, config.gpus_per_node // at_once)}"]
    if program == "sweep":
        sweep, space = resolve_sweep(overrides, here=False)
        trees = [compose_tree(overrides_of(space.fixed, settings)) for settings in space.samples()]
    else:
        trees = [compose_tree(overrides)]
    from rowwise.trainer.check import check  # torch, which no mistyped key waits for
    from rowwise.trainer.config import config_from_tree

    runs = [config_from_tree(tree) for tree in trees]
    for run in runs:
        check(run, config.nodes * workers_of_node(run, config, at_once))
    name = config.name or (sweep.name if program == "sweep" else runs[0].name)
    log = config.log or f"{name.replace('/', '-')}-{'%A_%a' if config.workers > 1 else '%j'}.log"
    return replace(config, name=name, log=log), [
        config.python or sys.executable,
        "-P",
        "-m",
        PROGRAMS[program],
        *overrides,
    ]


def trials_at_once(overrides: list[str], config: SlurmConfig) -> int:
    """Counts the trials that run at once on a node. Raises ValueError for a sweep that these jobs cannot make."""
    keys = {word: key_of(word) for word in overrides}
    for word, key in keys.items():
        if key.startswith("hydra") and key != SEARCHPATH:
            raise ValueError(f"{word}: these jobs make the trials themselves; leave Hydra's launcher out")
    sweep, _ = compose_part("sweep", SweepConfig, [word for word, key in keys.items() if key.startswith("sweep.")])
    if config.nodes > 1:
        raise ValueError(
            f"slurm.nodes={config.nodes}: a trial has one node; give slurm.workers={config.nodes}, jobs that join a search"
        )
    if config.workers > 1 and sweep.search == "none":
        raise ValueError(
            f"slurm.workers={config.workers}: jobs join a search; give sweep.search=grid for every combination, or random, "
            "tpe or gp"
        )
    return sweep.parallel


def workers_of_node(run: "TrainConfig", config: SlurmConfig, at_once: int) -> int:
    """Counts the workers of a node. Raises ValueError where the nodes' GPUs, of which this machine knows nothing, would decide, or
    are too few."""
    if run.nproc is None:
        raise ValueError(
            "nproc is not given, and the nodes are not looked at here; give nproc, the workers of a node, or "
            "slurm.gpus_per_node"
        )
    if config.gpus_per_node is not None and run.nproc * at_once > config.gpus_per_node:
        times = f" and sweep.parallel={at_once}" if at_once > 1 else ""
        raise ValueError(
            f"nproc={run.nproc}{times} with slurm.gpus_per_node={config.gpus_per_node}: each worker has a GPU of its own; "
            "give fewer workers, or more GPUs"
        )
    return run.nproc


def script(config: SlurmConfig, command: list[str]) -> str:
    """Returns the batch script that runs `command` once on every node."""
    srun = "srun --ntasks-per-node=1 --kill-on-bad-exit=1"
    if config.cpus_per_task is not None:
        srun += f" --cpus-per-task={config.cpus_per_task}"  # which srun no longer takes from sbatch
    program, options = shlex.join(command[:4]), command[4:]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options(config)),
        "\nset -e",
        *config.setup,
        *([_TOKEN] if config.nodes > 1 else []),
        "\n# One task a node: it starts the workers of its node and watches them.",
        " \\\n    ".join([srun, program, *map(shlex.quote, options)]) + " &",
        "srun=$!",
        _WAITING.format(seconds=config.signal_seconds),
    ]
    # The id of an array's last job is also that of the whole array.
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if config.workers > 1 else "$SLURM_JOB_ID"
    if config.requeue:
        lines.append(_REQUEUE.format(job=job))
    return "\n".join([*lines, "exit $code", ""])


def sbatch_options(config: SlurmConfig) -> list[str]:
    """Lists the lines after #SBATCH."""
    given = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": config.gpus_per_node,
        "cpus-per-task": config.cpus_per_task,
        "mem": config.mem,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "array": f"1-{config.workers}" if config.workers > 1 else None,
        "output": config.log,
        "open-mode": "append",  # a job that begins again keeps what it said
        "signal": f"B:USR1@{config.signal_seconds}",
    }
    options = [f"--{key}={shlex.quote(str(value))}" for key, value in given.items() if value is not None]
    return [*options, "--requeue" if config.requeue else "--no-requeue", *config.extra]


_TOKEN = f"""
# What the nodes of this job know, and who else may reach their port does not. It stands in no command line.
{TOKEN}=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export {TOKEN}"""

_WAITING = """
# {seconds} seconds before the time limit, Slurm sends USR1 to this script alone. srun passes it on to every node,
# and the run finishes its step, saves and leaves.
asked=
trap 'asked=yes; kill -USR1 $srun || true' USR1
while kill -0 $srun 2>/dev/null; do wait $srun || true; done  # a signal ends `wait`, not srun
code=0
wait $srun || code=$?
"""

_REQUEUE = """\
# Into the queue again, to go on from there: where the time was up, or the nodes are wanted for a more urgent job (then
# Slurm asks srun itself, and takes a job that leaves in time for a complete one). A run that failed stays failed;
# 138 and 143 are of one that was asked before it could hear.
job={job}
if [[ $asked ]] || scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; then
    case $code in 0 | 138 | 143) scontrol requeue "$job" ;; esac
fi
"""


def submit(text: str) -> str:
    """Hands the script to sbatch; the job's id. Raises ValueError with what sbatch says."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError("sbatch is not on this machine; submit from one of the cluster's, or give to=FILE") from None
    if done.returncode != 0:
        raise ValueError(" ".join(done.stderr.split()))
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
