"""What this trainer costs over plain PyTorch, and what others cost: the same model, data, rule and ranks for all.

    python benchmarks/overhead.py                                 the default model, 2 workers
    python benchmarks/overhead.py --turns 30 model=llama_60m batch.micro_size=2

Every contestant is a torchrun job of its own:

| contestant | what runs |
|---|---|
| bare | DistributedDataParallel, fused AdamW, `no_sync`, `clip_grad_norm_`: a loop of ten lines |
| accelerate | the same loop through Accelerate |
| transformers | the transformers Trainer |
| rowwise zero N | `rowwise.launch.train.main`: the product's own entry, parallel.zero=N |

First each is started alone, `--starts` times, for the seconds to its first step. Then all are started, and take turns of
a few steps: while one runs the others sleep, each in the memory that it has. So contestants are compared within seconds
of each other, and a machine whose speed drifts slows all alike; ratios are taken turn by turn. One clock for all: a hook
after every optimizer step of the process, so everything that an iteration does is in a turn: data, logging, the host's
waiting. Tokens per second are those of all ranks on the slowest one; `cpu_seconds` are processor seconds of all ranks.
All start from the same numbers and read the same samples, so their last losses agree until float32 has drifted apart:
they did the same work. The others know only their own rank's loss at each step; ours reduces it over all ranks, and
writes a record a step.

Then the saves, on one state in one job: how long the loop is blocked by a save in the background, by one that is not,
and by a plain torch.distributed.checkpoint.save of the same tensors.
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, Clock, Job
from record import spread, write_record
from saves import STEPS_BESIDE, saves

FIXED = ["resume=never", "eval.every=0", "sample.tokens=0", "checkpoint.every=0", "schedule=constant"]
ADJUSTABLE = ("model", "batch.", "optim.", "seed=")  # what every contestant obeys
LARGE = [
    "model.layers=8", "model.dim=512", "model.heads=8", "model.kv_heads=4", "model.ffn_dim=1408", "batch.micro_size=1",
]  # fmt: skip


def work(contestant: str, folder: Path) -> None:
    """One rank of a job that `Entrant` or `run_saves` started."""
    with (folder / "job.pickle").open("rb") as file:
        job = pickle.load(file)
    if contestant == "saves":
        answer: Any = saves(job, folder)
    else:
        with Client(str(folder / "race")) as race:
            clock = Clock(job, race)
            answer = CONTESTANTS[contestant](job, folder)
        assert clock.steps == job.last_step, f"{contestant} made {clock.steps} steps instead of {job.last_step}"
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(answer))


class Entrant:
    """A contestant's job, started under torchrun; it has made its warm-up steps and sleeps when this returns."""

    def __init__(self, contestant: str, job: Job, stack: ExitStack):
        self._job, self._folder = job, Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = time.time()
        with Listener(str(self._folder / "race")) as listener:
            self._process = start(contestant, job, self._folder)
            stack.callback(self._process.kill)
            self._ranks: list[Connection] = [listener.accept() for _ in range(job.workers)]
        self.first_step_seconds = max(found["first_step_at"] for found in self._hear()) - started
        self._hear()

    def turn(self) -> dict[str, float]:
        """A turn of this contestant, in figures."""
        for rank in self._ranks:
            rank.send(None)
        ranks = self._hear()
        tokens = self._job.turn * self._job.batch.global_size * self._job.batch.seq_len
        return {
            "tokens_per_second": tokens / max(rank["wall"] for rank in ranks),
            "cpu_seconds": sum(rank["cpu"] for rank in ranks),
            "peak_memory_bytes": max(rank["peak_bytes"] for rank in ranks),
        }

    def last_loss(self) -> float:
        """The mean over ranks of what each saw, once the job has ended."""
        losses = [loss for loss in answers(self._process, self._job, self._folder) if loss is not None]
        return sum(losses) / len(losses)

    def _hear(self) -> list[dict[str, float]]:
        return [rank.recv() for rank in self._ranks]


def start(contestant: str, job: Job, folder: Path) -> subprocess.Popen:
    """`work` on every rank, under torchrun."""
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.workers),
               __file__, "--contestant", contestant, "--folder", str(folder)]  # fmt: skip
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=os.environ | threads, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT
    )


def answers(process: subprocess.Popen, job: Job, folder: Path) -> list[Any]:
    """What each rank of a job says at its end."""
    if process.wait():
        sys.exit(f"a job failed:\n{(folder / 'log').read_text()}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(job.workers)]


def first_steps(job: Job, starts: int) -> dict[str, list[float]]:
    """contestant -> seconds from its start, alone on the machine, to the end of its first step."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(starts):
        for name in CONTESTANTS:
            with ExitStack() as stack:
                seconds[name].append(Entrant(name, with_zero(job, name), stack).first_step_seconds)
    return seconds


def race(job: Job) -> dict[str, dict[str, Any]]:
    """contestant -> its turns in figures, its last loss."""
    with ExitStack() as stack:
        entrants = {name: Entrant(name, with_zero(job, name), stack) for name in CONTESTANTS}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in entrants}
        losses: dict[str, float] = {}
        for number in range(job.turns):
            for name, entrant in entrants.items():
                turns[name].append(entrant.turn())
                if number + 1 == job.turns:
                    losses[name] = entrant.last_loss()  # waits for its end, which would be beside the next one's turn
            print(f"turn {number + 1}/{job.turns}  " + "  ".join(
                f"{name} {rows[-1]['tokens_per_second']:,.0f}" for name, rows in turns.items()), flush=True)  # fmt: skip
        return {name: {"turns": turns[name], "last_loss": losses[name]} for name in entrants}


def with_zero(job: Job, contestant: str) -> Job:
    zero = contestant.removeprefix("rowwise zero ")
    return with_overrides(job, f"parallel.zero={zero}") if zero.isdigit() else job


def make_job(options: argparse.Namespace) -> Job:
    """The job of this command line. Builds the corpus, which is nobody's start."""
    from rowwise.launch.compose import compose_tree
    from rowwise.trainer.check import check
    from rowwise.trainer.config import config_from_tree
    from rowwise.trainer.data.open import open_data

    overrides = ["name=overhead", *FIXED, *options.overrides]
    config = check(config_from_tree(compose_tree(overrides)), options.workers)
    open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    return Job(
        overrides, config.model, config.batch, config.data, config.optim, config.clip_norm, config.seed,
        options.warmup, options.turn, options.turns, options.workers,
    )  # fmt: skip


def with_overrides(job: Job, *more: str) -> Job:
    return replace(job, overrides=[*job.overrides, *more])


def run_saves(job: Job) -> dict[str, dict[str, Any]]:
    """The saves of the model of the race, and of a larger one."""
    large = with_overrides(job, *LARGE, f"batch.global_size={job.workers}")
    found = {}
    for name, which in (("raced", job), ("large", large)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = answers(start("saves", which, Path(folder)), which, Path(folder))[0]
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """ours -> theirs -> how many times faster ours was, turn by turn; and the same in processor seconds."""
    ours = [name for name in found if name.startswith("rowwise")]
    return {
        mine: {
            other: {
                "speed": spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]),
                "cpu": spread([b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs]),
            }
            for other in found
            if other not in ours and (pairs := list(zip(found[mine]["turns"], found[other]["turns"], strict=True)))
        }
        for mine in ours
    }


def print_tables(found: dict, compared: dict, saved: dict) -> None:
    """Medians; of the ratios, their quartiles too."""
    print("\n| contestant | tokens/s | seconds to first step | cpu seconds a turn | peak memory MB | last loss |")
    print("|---|---|---|---|---|---|")
    for name, entrant in found.items():
        keys = ("tokens_per_second", "cpu_seconds", "peak_memory_bytes")
        tokens, cpu, peak = (statistics.median(turn[key] for turn in entrant["turns"]) for key in keys)
        first = statistics.median(entrant["first_step_seconds"])
        print(f"| {name} | {tokens:,.0f} | {first:.2f} | {cpu:.2f} | {peak / 1e6:,.0f} "
              f"| {entrant['last_loss']:.5f} |")  # fmt: skip
    print("\n| ours / theirs | tokens/s | quartiles | by cpu seconds |\n|---|---|---|---|")
    for mine, others in compared.items():
        for other, ratio in others.items():
            low, high = ratio["speed"]["quartiles"]
            print(f"| {mine} / {other} | {ratio['speed']['median']:.3f} | {low:.3f} to {high:.3f} "
                  f"| {ratio['cpu']['median']:.3f} |")  # fmt: skip
    print(f"\n| state | save | blocks the loop, s | {STEPS_BESIDE} steps after it, s |\n|---|---|---|---|")
    for name, ways in saved.items():
        for way in ("idle", "background", "foreground", "plain"):
            row = ways[way]
            print(f"| {name}, {ways['state_bytes'] / 1e6:,.0f} MB | {way} | {row['blocked_seconds']:.3f} "
                  f"| {row['steps_seconds']:.2f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40, help="of each contestant")
    parser.add_argument("--turn", type=int, default=4, help="steps in a turn")
    parser.add_argument("--starts", type=int, default=3, help="of each contestant alone")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"of {', '.join(ADJUSTABLE)}")
    options = parser.parse_args()
    if options.contestant:
        return work(options.contestant, options.folder)
    if refused := [text for text in options.overrides if not text.startswith(ADJUSTABLE)]:
        parser.error(f"{refused}: possible are {', '.join(ADJUSTABLE)}, which every contestant obeys")
    if min(options.warmup, options.turns) < 2 or min(options.turn, options.starts, options.workers) < 1:
        parser.error("--warmup and --turns are at least 2, the others at least 1")
    job = make_job(options)
    started = first_steps(job, options.starts)
    found = {name: {"first_step_seconds": started[name], **figures} for name, figures in race(job).items()}
    compared, saved = ratios(found), run_saves(job)
    print_tables(found, compared, saved)
    keys = ("starts", "turns", "turn", "warmup", "workers", "overrides")
    setting = {key: getattr(options, key) for key in keys}
    path = write_record("overhead", {"setting": setting, "contestants": found, "ratios": compared, "saves": saved})
    print(f"\nwritten: {path}")
    return None


if __name__ == "__main__":
    main()
