"""A step of AdamW whose states lie in files, beside the parts that it is made of, the disk, and DeepSpeed's on the same disk.

    python benchmarks/offload.py FOLDER            FOLDER is on the disk to be used; two minutes, and more where DeepSpeed compiles

Measured in turns, in seconds a step, of `--matrices` float32 matrices of 2,048 x 4,096 whose parameters and gradients are in memory:

    read, change, write     the parts alone: states to memory, rules on states that are in memory, states to the file; portion by
                            portion as a step has them
    step                    all of it at once, as a run does it
    deepspeed               `engine.step()` of ZeRO-3 with `offload_optimizer` on the disk, pipelined reads and writes, threads and
                            portions as ours. It keeps a copy of the parameters there too: 12 bytes a parameter, ours are 8

and of the disk, by fio, in bytes a second: reads, writes, and both at once, of 4 MiB, four under way, past the system's cache; in
every round, since a disk that others share is not the same a minute later. The share of the disk that a step reaches is its bytes a
second over those of fio's reads and writes at once, of the same round; the median of them is told.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import spread, write_record
from torch import Tensor, nn

from rowwise.kernels.spec import ParameterSpec
from rowwise.launch.compose import compose_tree
from rowwise.launch.workers import keep_freed_memory
from rowwise.optim.build import build_optimizer
from rowwise.optim.home import Portion
from rowwise.parallel.host_rows import HostRows
from rowwise.parallel.row_file import PIECE, THREADS, RowFile
from rowwise.trainer.config import config_from_tree

SHAPE = torch.Size((2048, 4096))


class Matrix(nn.Module):
    """A matrix whose gradient is the same number everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(SHAPE, 0.02))

    def forward(self) -> Tensor:
        return (self.weight * 1e-3).sum()


class Matrices(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.all = nn.ModuleList(Matrix() for _ in range(count))

    def forward(self) -> Tensor:
        return torch.stack([one() for one in self.all]).sum()

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {name: ParameterSpec(SHAPE, "hidden") for name, _ in self.named_parameters()}


class Ours:
    """The step, and its parts."""

    def __init__(self, folder: Path, count: int):
        self.model, config = Matrices(count), config_from_tree(compose_tree(["optim=adamw"])).optim
        self.file = RowFile(folder, f"memory.offload_states={folder}")
        self.home = HostRows(torch.device("cpu"), [self.file], self.file)
        self.optimizer = build_optimizer(self.model, config, home=self.home)
        self.model().backward()
        self.bytes = sum(t.nbytes for state in self.optimizer.state.values() for t in state.values())

    def parts(self) -> dict[str, Callable[[], None]]:
        portions = self.portions()
        there = [[t for entry in portion.entries for t in entry.state.values()] for portion in portions]
        few = [self.home.fetch(states)() for states in there[:4]]  # as they lie in memory, again and again
        here = [few[number % len(few)] for number in range(len(there))]

        def in_flight(begin: Callable[[int], Callable[[], Any]]) -> None:
            """Two portions under way, as in a step."""
            before = None
            for number in range(len(there)):
                wait = begin(number)
                if before is not None:
                    before()
                before = wait
            if before is not None:
                before()

        def change() -> None:
            for portion, states in zip(portions, here, strict=True):
                left = iter(states)
                entries = [entry._replace(state={key: next(left) for key in entry.state}) for entry in portion.entries]
                self.optimizer._change(portion._replace(entries=entries))

        with torch.no_grad():
            return {
                "read": lambda: in_flight(lambda number: self.home.fetch(there[number])),
                "change": torch.no_grad()(change),
                "write": lambda: in_flight(lambda number: self.home.put(here[number], there[number])),
                "step": self.optimizer.step,
            }

    def portions(self) -> list[Portion]:
        (group,) = self.optimizer.param_groups
        live = list(zip(group["names"], group["params"], strict=True))
        return list(self.optimizer._portions(group, live))


class DeepSpeeds:
    """The step of an engine in a process of its own, which makes one for each line that it reads, once it has said so: what compiles
    for it before would read them."""

    def __init__(self, folder: Path, count: int, portion: int):
        command = [sys.executable, __file__, str(folder), f"--matrices={count}", f"--deepspeed={portion}"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

        self._answer("ready")

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer("seconds"))

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError("DeepSpeed has ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve_deepspeed(folder: Path, count: int, portion: int) -> None:
    """Makes a step for each line that is read, and says how long it took."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29617",
    }
    import deepspeed

    place = {"device": "nvme", "nvme_path": str(folder), "pin_memory": True, "buffer_count": 16,
             "pipeline_read": True, "pipeline_write": True}  # fmt: skip
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "aio": {
            "block_size": PIECE,
            "queue_depth": 8,
            "thread_count": THREADS,
            "single_submit": False,
            "overlap_events": True,
        },
        "zero_optimization": {"stage": 3, "offload_optimizer": place, "sub_group_size": portion},
    }
    model = Matrices(count)
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    print("\nready", flush=True)
    for _ in sys.stdin:
        engine.backward(engine())
        started = time.perf_counter()
        engine.step()
        print(f"\nseconds {time.perf_counter() - started}", flush=True)


def disk(folder: Path, seconds: int) -> dict[str, float]:
    """Measures the bytes a second of the disk by fio: reads, writes, and both together."""
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for kind in ("read", "write", "rw"):
            command = ["fio", "--name=disk", f"--directory={place}", f"--rw={kind}", "--bs=4M", "--size=1G", "--iodepth=4",
                       "--ioengine=libaio", "--direct=1", f"--runtime={seconds}", "--time_based", "--output-format=json"]  # fmt: skip
            (job,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["jobs"]
            found[kind] = job["read"]["bw_bytes"] + job["write"]["bw_bytes"]
    return found


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(folder: Path, count: int, rounds: int, peer: bool, seconds: int) -> dict[str, Any]:
    ours = Ours(folder, count)
    portion = sum(entry.param.numel() for entry in ours.portions()[0].entries)
    theirs = DeepSpeeds(folder, count, portion) if peer else None
    calls = ours.parts()
    found: dict[str, list[float]] = {name: [] for name in calls}
    disks: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first makes room
        for name, call in calls.items():
            found[name] += [timed(call)] if number else [0 * timed(call)][:0]
        if theirs is not None:
            second = theirs.seconds()
            found.setdefault("deepspeed", []).extend([second] if number else [])
        for kind, speed in disk(folder, seconds).items() if number and shutil.which("fio") else ():
            disks.setdefault(kind, []).append(speed)
    if theirs is not None:
        theirs.close()
    ours.home.close()
    times = {name: spread(values) for name, values in found.items()}
    middle = {name: one["median"] for name, one in times.items()}
    moved = 2 * ours.bytes
    told = {
        "parameters": count * SHAPE.numel(), "state_bytes": ours.bytes, "portion_numbers": portion, "seconds": times,
        "sum_of_parts_over_step": (middle["read"] + middle["change"] + middle["write"]) / middle["step"],
        "bytes_a_second": {"step": moved / middle["step"], "read": ours.bytes / middle["read"], "write": ours.bytes / middle["write"]},
        "disk": {kind: spread(values) for kind, values in disks.items()},
    }  # fmt: skip
    if disks:
        told["share_of_the_disk"] = {
            name: spread([bytes_ / took / speed for took, speed in zip(found[name], disks[kind], strict=True)])
            for name, kind, bytes_ in (
                ("step", "rw", moved),
                ("read", "read", ours.bytes),
                ("write", "write", ours.bytes),
            )
        }
    if theirs is not None:
        told["deepspeed_over_step"] = middle["deepspeed"] / middle["step"]
        told["deepspeed_state_bytes"] = ours.bytes * 3 // 2
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--matrices", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=6, help="of each measurement of the disk")
    parser.add_argument("--alone", action="store_true", help="without DeepSpeed")
    parser.add_argument("--deepspeed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    if options.deepspeed:
        serve_deepspeed(options.folder, options.matrices, options.deepspeed)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        told = measure(Path(place), options.matrices, options.rounds, not options.alone, options.seconds)
    print(json.dumps(told, indent=1))
    print(write_record("offload", told))


if __name__ == "__main__":
    main()
