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
one step of each, so that a machine whose speed drifts slows all alike, and ratios are taken round by round. Each number of
threads has a process of its own, since DeepSpeed's OpenMP reads it once. Beside the seconds stand the processor's, of all
threads: where others compute too, those and the ratios of them tell more, of one thread. `bytes`: what a step must read and write;
beside the bytes a second that it reaches stands what a copy of a GiB reaches in the same rounds.
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
Taken = tuple[float, float]  # seconds, and the processor's


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
    slow = [rule for rule in RULES if rule != "adamw" or dtype == torch.bfloat16]
    steps |= {f"{rule}, plain": plainly(steps[rule]) for rule in slow}
    source = torch.ones(1 << 30, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(1)
    taken: dict[str, list[Taken]] = {name: [] for name in ["copy", *steps]}
    for name in optimizers:
        steps[name]()  # compiles, and makes states
    for number in range(rounds):
        taken["copy"].append(timed(lambda: target.copy_(source)))
        for name in [name for name in steps if number < PLAIN_ROUNDS or "plain" not in name]:
            taken[name].append(timed(steps[name]))
    moved = {name: moved_bytes(params, optimizers[name.partition(",")[0]]) for name in steps} | {"copy": 2 << 30}
    figures = {name: figure(times, moved[name], count) for name, times in taken.items()}
    others = [*PEERS, *(name for name in steps if "plain" in name)]
    faster = {rule: {other: ratios(taken[other], taken[rule]) for other in others} for rule in RULES}
    return {"contestants": figures, "times_faster_than": faster}


def timed(step: Callable[[], Any]) -> Taken:
    """Seconds that passed, and those that processors computed for all threads of this process."""
    begun, computed = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - begun, time.process_time() - computed


def figure(times: list[Taken], moved: int, count: int) -> dict[str, Any]:
    seconds, computed = (spread(list(each)) for each in zip(*times, strict=True))
    elements = count * SHAPE[0] * SHAPE[1]
    return {
        "seconds": seconds,
        "processor_seconds": computed,
        "nanoseconds_per_parameter": 1e9 * seconds["median"] / elements,
        "processor_nanoseconds_per_parameter": 1e9 * computed["median"] / elements,
        "bytes": moved,
        "bytes_per_second": moved / seconds["median"],
    }


def ratios(slow: list[Taken], fast: list[Taken]) -> dict[str, Any]:
    """Round by round, of the seconds and of the processor's."""
    pairs = list(zip(slow, fast, strict=False))
    kinds = ("seconds", "processor_seconds")
    return {kind: spread([a[i] / b[i] for a, b in pairs]) for i, kind in enumerate(kinds)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the record holds: a process for each number of threads, one after the other."""
    one = [sys.executable, __file__, "--one", "--matrices", str(options.matrices), "--rounds", str(options.rounds)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja, with which DeepSpeed compiles
    alone = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    found, loads = {}, [os.getloadavg()[0]]
    for threads in options.threads:
        environment = os.environ | alone | {"OMP_NUM_THREADS": str(threads)}
        said = subprocess.run(one, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[threads] = json.loads(said.splitlines()[-1])
        loads.append(os.getloadavg()[0])
    parameters = options.matrices * SHAPE[0] * SHAPE[1]
    return {"setting": {**vars(options), "parameters": parameters, "loads": loads}, "threads": found}


def rows(found: dict[str, Any]) -> Iterator[str]:
    """The tables, line by line."""
    for threads, races in found["threads"].items():
        for dtype, result in races.items():
            yield f"\n{threads} threads, parameters and gradients {dtype}; ratios of seconds, of processor seconds\n"
            heads = [*(f"x faster than {peer}" for peer in PEERS), "than plain"]
            yield f"| contestant | ms | ns a parameter | of a processor | GB/s | {' | '.join(heads)} |"
            yield "|---" * 8 + "|"
            for name, row in result["contestants"].items():
                faster = result["times_faster_than"].get(name, {})
                medians = [[kind["median"] for kind in faster.get(other, {}).values()]
                           for other in (*PEERS, f"{name}, plain")]  # fmt: skip
                cells = [name, f"{row['seconds']['median'] * 1e3:,.0f}", f"{row['nanoseconds_per_parameter']:.2f}",
                         f"{row['processor_nanoseconds_per_parameter']:.2f}", f"{row['bytes_per_second'] / 1e9:.1f}",
                         *(", ".join(f"{median:.2f}" for median in pair) for pair in medians)]  # fmt: skip
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
