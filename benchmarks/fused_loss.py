"""The loss of a head, forward and backward, without its logits and by way of them: seconds, and the bytes at their height.

python benchmarks/fused_loss.py                     one CPU thread: results/fused_loss.json
python benchmarks/fused_loss.py --device cuda       one GPU: results/fused_loss_gpu.json

All ways run in turns, each once a turn; a ratio is of two times of one turn, on a CPU of processor time. Bytes are those beside the
arguments and the gradient of the head, of a process of its own; for the shapes of large models they are counted where tensors have
no memory. Peers: Liger's fused_linear_cross_entropy and Apple's Cut Cross-Entropy, whose kernels need a GPU (the second has a form
for torch.compile too), and torchtune's loss by eight chunks of tokens, rewritten here.
"""

import argparse
import ctypes
import importlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor

from rowwise.kernels.cross_entropy import cross_entropy, linear_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from live_bytes import LiveBytes

SHAPES = {"cpu": [(2048, 256, 4096), (512, 256, 128_256)],
          "cuda": [(8192, 2048, 32_000), (8192, 2048, 128_256), (8192, 4096, 128_256)]}  # fmt: skip
LARGE = [(8192, 2048, 128_256), (8192, 4096, 128_256)]  # tokens, dim, words: counted
CHUNKS = 8
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(x @ w.t(), labels).total


def in_chunks(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Eight parts of the tokens, one after the other; autograd keeps the logits of each."""
    pairs = zip(x.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)
    return torch.stack([F.cross_entropy((part @ w.t()).float(), own, reduction="sum") for part, own in pairs]).sum()


def at_once(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, labels, 1.0).total


def later(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, labels).total


def compiled() -> Way:
    return torch.compile(plain)


def liger() -> Way:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda x, w, labels: function(x, w, labels, reduction="sum")


def cut(form: str) -> Way:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, w, labels: function(x, w, labels, reduction="sum", impl=form)


# What makes each way; it is asked where it is used.
WAYS: dict[str, Callable[[], Way]] = {
    "rowwise, at once": lambda: at_once,
    "rowwise, later": lambda: later,
    "plain": lambda: plain,
    "torch.compile of plain": compiled,
    "torchtune's chunks": lambda: in_chunks,
    "Liger": liger,
    "Cut Cross-Entropy": lambda: cut("cce"),
    "Cut Cross-Entropy, torch.compile": lambda: cut("torch_compile"),
}


def operands(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dim, words = shape
    x, w = (torch.randn(n, dim, dtype=dtype, device=device) for n in (tokens, words))
    labels = torch.randint(words, (tokens,), device=device)
    return x.requires_grad_(), w.mul_(0.02).requires_grad_(), labels


def step(way: Way, given: tuple[Tensor, Tensor, Tensor]) -> float:
    """Forward and backward. Returns the loss."""
    given[0].grad = given[1].grad = None
    loss = way(*given)
    loss.backward()
    return loss.item()


def refusal(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> str | None:
    """Why a way does not run here; None: it does, and gives the loss of the logits."""
    given = operands(shape, dtype, device)
    try:
        found, right = step(WAYS[name](), given), step(plain, given)
    except Exception as error:  # whatever a peer says where it does not run
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{type(error).__name__}: {lines[0]}"
    assert abs(found - right) < 1e-3 * right, f"{name}: the loss is {found}, and should be {right}"
    return None


def peak_bytes(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> int:
    """The most that one step takes beside its arguments and the head's gradient, in a process that has made one before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given, way = operands(shape, dtype, device), WAYS[name]()
    step(way, given)
    given[0].grad = given[1].grad = None
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(way, given)
        return torch.cuda.max_memory_allocated() - before - given[1].nbytes
    ctypes.CDLL(None).malloc_trim(0)  # what the first step left is no longer resident
    Path("/proc/self/clear_refs").write_text("5")  # the height of what is resident begins anew
    before = resident("VmRSS")
    step(way, given)
    return resident("VmHWM") - before - given[1].nbytes


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def counted_bytes(way: Way, shape: tuple[int, int, int]) -> int:
    """The same of bfloat16, counted operator by operator on the meta device."""
    tokens, dim, words = shape
    x, w = (torch.empty(n, dim, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (tokens, words))
    with LiveBytes() as live:
        way(x, w, torch.empty(tokens, dtype=torch.int64, device="meta")).backward()
    return live.peak - w.nbytes


def race(ways: dict[str, Way], given: tuple[Tensor, Tensor, Tensor], turns: int, device: str) -> dict[str, list[float]]:
    """The seconds of every way, one a turn. Every turn has another order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shuffled, clock = random.Random(0), time.perf_counter if device == "cuda" else time.process_time
    for _ in range(turns):
        for name in shuffled.sample(list(ways), len(ways)):
            began = clock()
            step(ways[name], given)  # which reads the loss
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - began)
    return seconds


def compare(
    names: list[str], shape: tuple[int, int, int], dtype: torch.dtype, device: str, turns: int
) -> dict[str, Any]:
    """Seconds, what share of the plain way's they are, and bytes, of every way."""
    ways = {name: WAYS[name]() for name in names}
    given = operands(shape, dtype, device)
    for way in ways.values():
        step(way, given)
    seconds = race(ways, given, turns, device)
    found: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for name, times in seconds.items():
            shares = [mine / plains for mine, plains in zip(times, seconds["plain"], strict=True)]
            low, _, high = statistics.quantiles(shares, n=4)
            found[name] = {
                "seconds": statistics.median(times),
                "of_plain": {"median": statistics.median(shares), "low": low, "high": high},
                "bytes": processes.apply(peak_bytes, (name, shape, dtype, device)),
            }
            print(line(shape, name, found[name]), flush=True)
    return {"tokens": shape[0], "dim": shape[1], "words": shape[2], "ways": found}


def line(shape: tuple[int, int, int], name: str, found: dict[str, Any]) -> str:
    share = found["of_plain"]
    times = f"{found['seconds']:8.3f} s  {share['median']:5.2f} ({share['low']:.2f}-{share['high']:.2f}) of plain"
    return f"{shape!s:22}  {name:34}{times}  {found['bytes'] / 1e6:9,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    before = os.getloadavg()[0]  # of other programs
    setting = {
        "device": options.device,
        "dtype": str(dtype),
        "threads": 1,
        "turns": options.turns,
        "load_average_before": before,
    }
    torch.manual_seed(0)
    refused = {name: why for name in WAYS if (why := refusal(name, (64, 64, 256), dtype, options.device)) is not None}
    names = [name for name in WAYS if name not in refused]
    print("do not run here:", json.dumps(refused, indent=1))
    measured = [compare(names, shape, dtype, options.device, options.turns) for shape in SHAPES[options.device]]
    eager = {"plain": plain, "torchtune's chunks": in_chunks, "rowwise, later": later}
    counted = [
        {"tokens": shape[0], "dim": shape[1], "words": shape[2], "dtype": "bf16"}
        | {"bytes": {name: counted_bytes(way, shape) for name, way in eager.items()}}
        for shape in LARGE
    ]
    for row in counted:
        print(row)
    name = "fused_loss" if options.device == "cpu" else "fused_loss_gpu"
    write_record(name, {"setting": setting, "measured": measured, "refused": refused, "counted": counted})


if __name__ == "__main__":
    main()
