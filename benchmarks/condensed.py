"""Layers of constant fan-in in condensed form against dense ones and torch's CSR, for inference.

python benchmarks/condensed.py                     one CPU thread: results/condensed.json
python benchmarks/condensed.py --device cuda       one GPU, and 2:4 layers: results/condensed_gpu.json

Density is 0.1 over the whole matrix; where neurons are ablated, the others have as many more weights. All ways run in
turns, each once a turn; a ratio is of two times of one turn. Lasby et al., *Dynamic Sparse Training with Structured
Sparsity*, report for 90 % sparsity on a CPU and batch 1 up to 3.4 times the speed of dense and 2.5 of CSR.
"""

import argparse
import itertools
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import write_record
from torch import Tensor, nn

from rowwise.kernels.condensed import condense
from rowwise.kernels.semi_structured import measure_semi_structured
from rowwise.trainer.models.condensed import CondensedLinear

SHAPES = [(768, 3072), (3072, 768), (1024, 4096), (4096, 4096)]  # out, in
BATCHES = (1, 64)
ABLATED = (0.0, 0.3)
DENSITY = 0.1
TOKENS = (1024, 8192)  # of the 2:4 layers
PAPER = {"over_dense": 3.4, "over_csr": 2.5}
Way = Callable[[], Tensor]


def constant_fan_in(rows: int, columns: int, ablated: float, device: torch.device) -> Tensor:
    """A weight (rows, columns) with DENSITY of it non-zero, in rows of one width, and a share of the rows ablated."""
    w = torch.zeros(rows, columns, device=device)
    live = torch.randperm(rows)[: round(rows * (1 - ablated))]
    k = round(DENSITY * columns * rows / len(live))
    for row in live:
        w[row, torch.randperm(columns, device=device)[:k]] = torch.randn(k, device=device)
    return w


def ways(w: Tensor, x: Tensor) -> dict[str, Way]:
    """x times w^T: condensed, dense, and every way of torch's with CSR."""
    linear = nn.Linear(w.size(1), w.size(0), bias=False, device=w.device)
    linear.weight.data = w
    condensed = CondensedLinear(condense(w), None)
    csr = w.to_sparse_csr()
    # Each with memory of its own: none finds it in a cache because of another.
    for_linear, for_matrix, for_vector = (int32_csr(csr) for _ in range(3))
    found: dict[str, Way] = {
        "condensed": lambda: condensed(x),
        "dense": lambda: linear(x),
        "csr, F.linear": lambda: F.linear(x, csr),
        "csr int32, F.linear": lambda: F.linear(x, for_linear),
        "csr int32 @ x^T": lambda: (for_matrix @ x.t()).t(),
    }
    if len(x) == 1:
        found["csr int32 @ vector"] = lambda: (for_vector @ x[0])[None]
    return found


def int32_csr(csr: Tensor) -> Tensor:
    """A copy with the indices that MKL has; others it converts at every call."""
    rows, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, csr.values().clone(), csr.shape, check_invariants=False)


def race(contestants: dict[str, Way], seconds: float, calls: int) -> dict[str, list[float]]:
    """The times of every way, one a turn, each of `calls` calls. Every turn has another order."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    shuffled, ended = random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < ended or len(times["dense"]) < 5:
        for name in shuffled.sample(list(contestants), len(contestants)):
            times[name].append(timed(contestants[name], calls))
    return times


def timed(way: Way, calls: int) -> float:
    """Seconds a call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        way()
    wait()
    return (time.perf_counter() - began) / calls


def quartiles(numbers: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(numbers, n=4)
    return {"median": median, "low": low, "high": high}


def compare(w: Tensor, batch: int, seconds: float, calls: int) -> dict[str, Any]:
    """Times, and how many times faster condensed is than each other way."""
    x = torch.randn(batch, w.size(1), dtype=w.dtype, device=w.device)
    expected = x.double() @ w.double().t()
    contestants, refused = {}, {}
    for name, way in ways(w, x).items():
        try:
            error = ((way().double() - expected).norm() / expected.norm()).item()
        except RuntimeError as refusal:  # torch has not every way on every device, in every dtype
            refused[name] = str(refusal).splitlines()[0]
            continue
        assert error < (1e-2 if w.dtype.itemsize == 2 else 1e-5), f"{name} is wrong by {error}"
        contestants[name] = way
    times = race(contestants, seconds, calls)
    ratios = {
        name: quartiles([theirs / ours for theirs, ours in zip(of, times["condensed"], strict=True)])
        for name, of in times.items()
        if name != "condensed"
    }
    csr = [name for name in times if name.startswith("csr")]
    return {
        "seconds": {name: quartiles(of) for name, of in times.items()},
        "times_faster_than": ratios,
        "fastest_csr": min(csr, key=lambda name: statistics.median(times[name]), default=None),
        "refused": refused,
        "turns": len(times["dense"]),
    }


def compare_all(device: torch.device, dtypes: tuple[str, ...], seconds: float, calls: int) -> list[dict[str, Any]]:
    """Every dtype, shape, share of ablated rows and batch; prints the table."""
    print(
        "dtype         out x in  ablated  batch  condensed us        over dense  over F.linear CSR   over the fastest CSR"
    )
    found = []
    for dtype, shape, ablated in itertools.product(dtypes, SHAPES, ABLATED):
        torch.manual_seed(0)
        w = constant_fan_in(*shape, ablated, device).to(getattr(torch, dtype))
        for batch in BATCHES:
            measured = compare(w, batch, seconds, calls)
            found.append({"dtype": dtype, "shape": shape, "ablated": ablated, "batch": batch, **measured})
            ours = measured["seconds"]["condensed"]["median"] * 1e6
            cells = "  ".join(cell(measured, way) for way in ("dense", "csr, F.linear", measured["fastest_csr"]))
            print(f"{dtype:8}{shape!s:>14}  {ablated:7.1f}  {batch:5}  {ours:12.0f}  {cells}", end="")
            print(f"  {measured['fastest_csr']}", flush=True)
    return found


def cell(measured: dict[str, Any], way: str | None) -> str:
    """How many times faster than one way: the median, and the quartiles."""
    if way not in measured["times_faster_than"]:
        return f"{'refused':>17}"
    ratio = measured["times_faster_than"][way]
    return f"{ratio['median']:5.2f} ({ratio['low']:4.2f}-{ratio['high']:5.2f})"


def two_of_four(device: torch.device) -> list[dict[str, Any]]:
    """How many times faster a 2:4 layer's forward and backward are than a dense one's."""
    found = []
    for shape, tokens in itertools.product(SHAPES, TOKENS):
        faster = measure_semi_structured(shape, tokens, torch.bfloat16, device)
        found.append({"shape": shape, "tokens": tokens, "dtype": "bf16", "times_faster_than_dense": faster})
        print(f"2:4 {shape!s:>14}  {tokens:6,} tokens  {faster:.2f} of dense")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of turns for each row of the table")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    torch.set_num_threads(1)
    device, cpu = torch.device(options.device), options.device == "cpu"
    setting = {"device": options.device, "threads": 1, "density": DENSITY, "seconds": options.seconds}
    setting["load_average_before"] = os.getloadavg()[0]  # of other programs
    dtypes = ("float32",) if cpu else ("float32", "bfloat16")
    with torch.inference_mode():
        layers = compare_all(device, dtypes, options.seconds, calls=1 if cpu else 20)
    measured: dict[str, Any] = {"layers": layers}
    if not cpu:
        measured["semi_structured"] = two_of_four(device)
    write_record("condensed" if cpu else "condensed_gpu", {"setting": setting, "paper": PAPER, **measured})


if __name__ == "__main__":
    main()
