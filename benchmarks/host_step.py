"""Time of an optimizer's step on the host, where offloaded states wait: our rules beside DeepSpeed's and torchao's.

    python benchmarks/host_step.py                          50 million parameters, one thread and two
    python benchmarks/host_step.py --threads 8 --rounds 20

| contestant | what steps |
|---|---|
| DeepSpeed | DeepSpeedCPUAdam, its kernel for processors: 32-bit states; 16-bit parameters are rounded to the nearest |
| torchao | what its CPUOffloadOptimizer calls on the host, a torch.optim.AdamW(fused=True) for each parameter |
| adamw, lion, adamw8bit, lion8bit | our optimizer with that rule; 16-bit parameters are rounded stochastically |
| ..., plain | the same where numba is not installed: plain torch |

(torchao's whole optimizer needs a GPU. Its states have 16 bits where parameters have.)

All step the same matrices with the same gradients, first of 32 bits, then of 16, each with its own states, in turns: a round times
one step of each, so that a machine whose speed drifts slows all alike, and ratios are taken round by round. Each number of threads
has a process of its own, since DeepSpeed's OpenMP reads it once. `bytes`: what a step must read and write; beside the bytes
a second that it reaches stands what a copy of a GiB reaches in the same round.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import spread, write_record
from torch import Tensor, nn

from rowwise.kernels import dispatch
from rowwise.optim.adamw import AdamW
from rowwise.optim.lion import Lion
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.quantized import AdamW8bit, Lion8bit

BETAS, EPS, LR, DECAY = [0.9, 0.95], 1e-8, 1e-5, 0.1
RULES = {
    "adamw": lambda: AdamW(BETAS, EPS),
    "lion": lambda: Lion(BETAS),
    "adamw8bit": lambda: AdamW8bit(BETAS, EPS),
    "lion8bit": lambda: Lion8bit(BETAS),
}
PEERS = ("DeepSpeed", "torchao")
SHAPE = (2048, 4096)
PLAIN_ROUNDS = 3  # of the slow ones


def matrices(count: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(SHAPE).mul_(0.02).to(dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(SHAPE).mul_(1e-3).to(dtype)
    return params


def ours(rule: str, params: list[nn.Parameter]) -> Optimizer:
    names = [f"w{i}" for i in range(len(params))]
    group = {"params": params, "names": names, "rule": RULES[rule](), "weight_decay": DECAY}
    return Optimizer([group | {"batched": False, "view": "dense"}], LR, seed=0)


def peer(name: str, params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Those that step one after the other. Raises whatever it raises where it is not installed."""
    rates: dict[str, Any] = {"lr": LR, "betas": tuple(BETAS), "eps": EPS, "weight_decay": DECAY}
    if name == "DeepSpeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return [DeepSpeedCPUAdam(params, **rates)]
    return [torch.optim.AdamW([p], **rates, fused=True) for p in params]


def stepper(optimizers: list[Any]) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def plainly(step: Callable[[], None]) -> Callable[[], None]:
    """The same step where numba is not to be had."""

    def plain() -> None:
        worth, dispatch.WORTH_NUMBA = dispatch.WORTH_NUMBA, sys.maxsize
        step()
        dispatch.WORTH_NUMBA = worth

    return plain


def moved_bytes(params: list[nn.Parameter], optimizers: list[Any]) -> int:
    """Gradients are read, all else is read and written."""
    states = [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    kept = [t for t in states if isinstance(t, Tensor)]
    return sum(2 * p.nbytes + p.grad.nbytes for p in params) + sum(2 * t.nbytes for t in kept)


def race(dtype: torch.dtype, count: int, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each contestant, and how many times faster ours are than each of the others."""
    params = matrices(count, dtype)
    optimizers = {name: peer(name, params) for name in PEERS} | {rule: [ours(rule, params)] for rule in RULES}
    steps = {name: stepper(some) for name, some in optimizers.items()}
    slow = [rule for rule in RULES if rule.endswith("8bit") or dtype == torch.bfloat16]
    steps |= {f"{rule}, plain": plainly(steps[rule]) for rule in slow}
    source = torch.ones(1 << 30, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(1)
    seconds: dict[str, list[float]] = {name: [] for name in [*steps, "copy"]}
    for name in optimizers:
        steps[name]()  # compiles, and makes states
    for number in range(rounds):
        seconds["copy"].append(seconds_of(lambda: target.copy_(source)))
        for name in [name for name in steps if number < PLAIN_ROUNDS or "plain" not in name]:
            seconds[name].append(seconds_of(steps[name]))
    moved = {name: moved_bytes(params, optimizers[name.partition(",")[0]]) for name in steps} | {"copy": 2 << 30}
    figures = {name: figure(taken, moved[name], count) for name, taken in seconds.items()}
    others = [*PEERS, *(name for name in steps if "plain" in name)]
    faster = {rule: {other: ratio(seconds[other], seconds[rule]) for other in others} for rule in RULES}
    return {"contestants": figures, "times_faster_than": faster}


def seconds_of(step: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def figure(seconds: list[float], moved: int, count: int) -> dict[str, Any]:
    taken = spread(seconds)
    per_second = moved / taken["median"]
    elements = count * SHAPE[0] * SHAPE[1]
    return {"seconds": taken, "nanoseconds_per_parameter": 1e9 * taken["median"] / elements, "bytes": moved,
            "bytes_per_second": per_second}  # fmt: skip


def ratio(slow: list[float], fast: list[float]) -> dict[str, Any]:
    return spread([a / b for a, b in zip(slow, fast, strict=False)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the record holds: a process for each number of threads, one after the other."""
    found = {}
    for threads in options.threads:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # ninja, for DeepSpeed
        command = [
            sys.executable,
            __file__,
            "--one",
            "--matrices",
            str(options.matrices),
            "--rounds",
            str(options.rounds),
        ]
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[threads] = json.loads(said.splitlines()[-1])
    parameters = options.matrices * SHAPE[0] * SHAPE[1]
    return {"setting": {**vars(options), "parameters": parameters, "load": os.getloadavg()}, "threads": found}


def rows(found: dict[str, Any]) -> Iterator[str]:
    """The tables, line by line."""
    for threads, races in found["threads"].items():
        for dtype, result in races.items():
            yield f"\n{threads} threads, parameters and gradients {dtype}\n"
            yield (
                "| contestant | ms | ns a parameter | GB/s | "
                + " | ".join(f"x faster than {p}" for p in PEERS)
                + " | than plain |"
            )
            yield "|---" * (5 + len(PEERS)) + "|"
            for name, row in result["contestants"].items():
                faster = result["times_faster_than"].get(name, {})
                ratios = [faster.get(other, {}).get("median") for other in (*PEERS, f"{name}, plain")]
                cells = [name, f"{row['seconds']['median'] * 1e3:,.0f}", f"{row['nanoseconds_per_parameter']:.2f}",
                         f"{row['bytes_per_second'] / 1e9:.1f}", *(f"{x:.2f}" if x else "" for x in ratios)]  # fmt: skip
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--matrices", type=int, default=6, help="of 2,048 x 4,096")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", action="store_true", help="only this process, whose figures go to stdout")
    parser.add_argument("--record", default="host_step", help="the name of the results file")
    options = parser.parse_args()
    if options.one:
        races = {str(dtype).removeprefix("torch."): race(dtype, options.matrices, options.rounds)
                 for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
        print(json.dumps(races))
        return
    found = measure(options)
    print(*rows(found), sep="\n")
    print(f"\nwritten: {write_record(options.record, found)}")


if __name__ == "__main__":
    main()
