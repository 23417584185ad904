"""One model, options added one at a time: the most bytes that a rank holds at once, as forecast and as counted, and tokens per second.

python benchmarks/memory_stack.py                                        llama_60m, 2 ranks (GPUs where there are enough, else CPU)
python benchmarks/memory_stack.py --model llama_1b --ranks 1 --seq-len 4096 --precision bf16
python benchmarks/memory_stack.py --model tiny --seq-len 1024 --micro-size 4 --to memory_stack_long      activations are most of it
python benchmarks/memory_stack.py --only plain,full --rounds 1           some of the rungs, once

A rung has what those above it have. Bytes are rank 0's in its first step, forward, backward and update: torch's own count of a GPU's
memory, or on the CPU those of all tensors that live (`parallel.lifetimes`). Tokens per second are of all ranks together, the best of
so many rounds, each of which goes through all rungs: what else a machine does comes to all alike.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from processes import on_ranks
from record import write_record
from stepping import stepping

from rowwise.launch.compose import compose_tree
from rowwise.parallel.mesh import Workers
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.memory import measured_bytes, watching
from rowwise.trainer.plan.memory import memory_of
from rowwise.trainer.plan.works import unknown

FOLDER = "FOLDER"  # one that is there while the ladder is climbed

# In their order.
RUNGS: dict[str, dict[str, object]] = {
    "plain": {"optim": "adamw", "parallel.zero": 0, "memory.fused_loss": "false"},
    "fused loss": {"memory.fused_loss": "true"},
    "selective": {"memory.recompute": "selective"},
    "int8": {"memory.compress": "int8"},
    "full": {"memory.recompute": "full"},
    "offloaded": {"memory.offload_activations": FOLDER},
    "adamw8bit": {"optim": "adamw8bit"},
    "in backward": {"optim.in_backward": "true", "clip_norm": 0},
    "zero 3": {"parallel.zero": 3},
}
STEPS = 2  # that are timed in a round


@dataclass(frozen=True)
class Size:
    """What every rung trains: one micro-batch a rank and step."""

    model: str
    ranks: int
    seq_len: int
    micro_size: int
    precision: str

    def config(self, options: dict[str, object], folder: str) -> TrainConfig:
        """Composes and checks a rung."""
        mine = [f"model={self.model}", f"precision={self.precision}", "eval.every=0", "sample.tokens=0"]
        mine += [f"batch.seq_len={self.seq_len}", f"batch.micro_size={self.micro_size}"]
        mine += [f"batch.global_size={self.ranks * self.micro_size}"]
        added = [f"{key}={folder if value == FOLDER else value}" for key, value in options.items()]
        return check(config_from_tree(compose_tree([*mine, *added])), self.ranks)


def climb(config: TrainConfig, workers: Workers) -> dict[str, Any]:
    """A few steps of a rung: this rank's bytes in the first, as forecast (None: that is not known) and as counted, and tokens per
    second of all ranks."""
    with stepping(config, workers) as own:
        gpu = own.mesh.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        with watching(config, own.mesh, own.engine.model, 1, True) as watch:
            own.step(1)
        measured, _ = measured_bytes(watch, own.engine.model, own.optimizer, 0)
        predicted = None
        if unknown(config) is None:
            memory = memory_of(config, workers.rank, gpu, None)
            predicted = {**memory.peaks, "total": memory.most}
        if gpu:
            measured = {"total": torch.cuda.max_memory_allocated()}
        dist.barrier()
        began = time.perf_counter()
        for number in range(STEPS):
            own.step(2 + number)
        dist.barrier()
        seconds = time.perf_counter() - began
    tokens = STEPS * config.batch.global_size * config.batch.seq_len
    return {"predicted": predicted, "measured": measured, "tokens_per_second": tokens / seconds}


def climbs(
    rank: int, ranks: int, port: int, rungs: dict[str, TrainConfig], rounds: int
) -> list[dict[str, dict[str, Any]]]:
    """Goes through all rungs, so many times: what each gives, by round and name."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    found: list[dict[str, dict[str, Any]]] = [{} for _ in range(rounds)]
    for number in range(rounds):
        for name, config in rungs.items():
            own = dist.PrefixStore(f"{number} {name}", store)
            found[number][name] = climb(config, Workers(rank, ranks, rank, ranks, own))
            if rank == 0:
                print(
                    f"round {number + 1}, {name}: {found[number][name]['tokens_per_second']:,.0f} tokens/s", flush=True
                )
    return found


def ladder(size: Size, only: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Climbs on so many ranks: of each rung its options, bytes, and tokens per second of each round."""
    options, added = dict[str, dict[str, object]](), dict[str, object]()
    for name, more in RUNGS.items():
        added |= more
        if name in only:
            options[name] = dict(added)
    with tempfile.TemporaryDirectory() as folder:
        configs = {name: size.config(words, folder) for name, words in options.items()}
        found = on_ranks(climbs, size.ranks, configs, rounds)
    speeds = {name: [one[name]["tokens_per_second"] for one in found] for name in options}
    return {name: {"options": options[name], **found[0][name], "tokens_per_second": speeds[name]} for name in options}


def show(rungs: dict[str, dict[str, Any]]) -> None:
    """Prints the table."""
    first = next(iter(rungs.values()))
    print(f"{'rung':12} {'forecast':>15} {'counted':>15} {'error':>8} {'of plain':>9} {'tokens/s':>9} {'of plain':>9}")
    for name, rung in rungs.items():
        held, speed = rung["measured"]["total"], max(rung["tokens_per_second"])
        said = rung["predicted"] and rung["predicted"]["total"]
        told = f"{said:15,} {held:15,} {said / held - 1:+8.2%}" if said else f"{'-':>15} {held:15,} {'-':>8}"
        share, slower = held / first["measured"]["total"], speed / max(first["tokens_per_second"])
        print(f"{name:12} {told} {share:9.3f} {speed:9,.0f} {slower:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-size", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default=",".join(RUNGS), help="names of rungs, the first of which all others are beside"
    )
    parser.add_argument("--to", default="memory_stack", help="the name of the results file")
    given = parser.parse_args()
    size = Size(given.model, given.ranks, given.seq_len, given.micro_size, given.precision)
    print(f"{size.model} in {size.precision}, {size.ranks} ranks, {size.micro_size} x {size.seq_len} tokens a forward")
    rungs = ladder(size, given.only.split(","), given.rounds)
    show(rungs)
    print(write_record(given.to, {"size": vars(size), "rungs": rungs}))


if __name__ == "__main__":
    main()
