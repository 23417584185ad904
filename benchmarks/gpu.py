"""Every check and benchmark that needs a GPU, in one command and one results file.

    python benchmarks/gpu.py                on a machine with one or more CUDA GPUs; writes results/gpu.json

Checks: every Triton kernel on the device against its reference on the CPU; attention block by block, as the ranks of a
ring would compute it; sparse layers and the selection of the largest; three float64 steps on the GPU against one plain CPU
process. Figures: the speed of the kernels, of attention and of sparse layers; tokens per second, MFU and peak memory of a
real run on one GPU in bf16; all of optimizer_step.py and optimizer_bytes.py. A check that fails is in the file, and the
exit code is 1.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optimizer_bytes
import optimizer_step
import torch
from gpu_attention import check_attention, time_attention
from gpu_sparse import check_condensed, check_nm, check_select, check_semi_structured, time_sparse
from record import write_record
from torch import Tensor

from rowwise.kernels.adamw8bit import adamw8bit_reference_
from rowwise.kernels.adamw8bit_triton import adamw8bit_triton_
from rowwise.kernels.blockwise import dequantise_reference_, quantise, quantise_reference_
from rowwise.kernels.blockwise_triton import dequantise_triton_, quantise_triton_
from rowwise.kernels.dct import column_squares_reference, dct_columns_reference
from rowwise.kernels.dct_triton import column_squares_triton, dct_columns_triton
from rowwise.kernels.lion8bit import lion8bit_reference_
from rowwise.kernels.lion8bit_triton import lion8bit_triton_
from rowwise.kernels.philox import normal, normal_reference, stream_key
from rowwise.kernels.rounding import round_reference_
from rowwise.kernels.rounding_triton import round_triton_
from rowwise.kernels.row_scale import scale_rows_reference
from rowwise.kernels.row_scale_triton import scale_rows_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TESTS = Path(__file__).parents[1] / "tests"
SHAPES = [(1, 1), (3, 255), (70, 768), (5, 1000), (1024, 5461), (4096, 4096)]


def check_philox() -> dict[str, Any]:
    """Words are the same; Box-Muller differs by the device's log, cos and sin."""
    worst = 0.0
    for start, count in [(0, 1), (3, 5), (1, 4097), (2**34 + 1, 1 << 20)]:
        key = stream_key(7, "w")
        ours, reference = (
            normal(key, start, count, CUDA).cpu(),
            normal_reference(key, start, count, torch.device("cpu")),
        )
        worst = max(worst, float((ours - reference).abs().max()))
    return {"largest_difference": worst, "passed": worst < 1e-4}


def check_blockwise() -> dict[str, Any]:
    """Codes, maxima and the numbers behind them: the same bits."""
    apart = 0
    for shape, dtype, signed in itertools.product(SHAPES, (torch.float32, torch.bfloat16), (True, False)):
        x = torch.randn(shape).mul_(0.01)
        x = (x if signed else x.square()).to(dtype)
        reference, ours = quantise(x, signed), moved(quantise(torch.zeros(shape), signed), CUDA)
        quantise_reference_(x, *reference, signed)
        quantise_triton_(x.to(CUDA), *ours, signed)
        numbers, our_numbers = torch.empty(shape), torch.empty(shape, device=CUDA)
        dequantise_reference_(*reference, signed, numbers)
        dequantise_triton_(*ours, signed, our_numbers)
        pairs = zip((*reference, numbers), (*ours, our_numbers), strict=True)
        apart += sum(int((a != b.cpu()).sum()) for a, b in pairs)
    return {"numbers_apart": apart, "passed": apart == 0}


def check_adamw8bit() -> dict[str, Any]:
    return check_step(adamw8bit_triton_, adamw8bit_reference_, (True, False), (5, 1e-2, 0.9, 0.95, 1e-8, 0.1))


def check_lion8bit() -> dict[str, Any]:
    return check_step(lion8bit_triton_, lion8bit_reference_, (True,), (1e-2, 0.9, 0.99, 0.1))


def check_step(triton_, reference_, signed: tuple[bool, ...], hyper: tuple) -> dict[str, Any]:
    """One step on moments of some age. The order of the arithmetic differs in the last place, so a number in ten
    thousand may have a code beside the other's, and one in a thousand be rounded to the bfloat16 beside it."""
    largest = {"codes": 0, "codes_share": 0.0, "float32": 0.0, "bfloat16_share": 0.0}
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        p, g = torch.randn(shape).to(dtype), torch.randn(shape).mul_(0.1).to(dtype)
        states = [quantise(torch.randn(shape).mul_(0.03) if s else torch.rand(shape) * 1e-2, s) for s in signed]
        rounding = [(2**63 + 7, 9)] if dtype == torch.bfloat16 else None
        ours = moved((p, g, states), CUDA)
        triton_([ours[0]], [ours[1]], *([state] for state in ours[2]), *hyper, rounding)
        reference_([p], [g], *([state] for state in states), *hyper, rounding)
        for ours_, state in zip(ours[2], states, strict=True):
            apart = (ours_[0].cpu().int() - state[0].int()).abs()
            largest["codes"] = max(largest["codes"], int(apart.max()))
            largest["codes_share"] = max(largest["codes_share"], (int(apart.sum()) - 1) / p.numel())
        beside = ours[0].cpu()
        if dtype == torch.float32:  # where Lion's direction is 0 to the last place, its sign may differ
            off = (beside - p).abs().flatten()
            largest["float32"] = max(largest["float32"], float(off.kthvalue(max(1, int(0.99999 * p.numel()))).values))
        else:
            largest["bfloat16_share"] = max(largest["bfloat16_share"], (int((beside != p).sum()) - 1) / p.numel())
    close = largest["codes_share"] <= 1e-4 and largest["float32"] <= 1e-5 and largest["bfloat16_share"] <= 1e-3
    return {**largest, "passed": close and largest["codes"] <= 1}


def check_rounding() -> dict[str, Any]:
    """The same bits from any start, of every kind of number."""
    apart, special = 0, torch.tensor([0.0, -0.0, 1e-40, 3.4e38, -3.4e38, torch.inf, -torch.inf])
    for start, count in [(0, 7), (3, 5), (1, 4097), (2**34 + 1, 1 << 22)]:
        x = torch.randn(count)
        x[: min(count, 7)] = special[: min(count, 7)]
        reference, ours = (torch.empty(count, dtype=torch.bfloat16, device=device) for device in (CPU, CUDA))
        round_reference_(x, reference, 7, start)
        round_triton_(x.to(CUDA), ours, 7, start)
        apart += int((reference.view(torch.int16) != ours.cpu().view(torch.int16)).sum())
    return {"numbers_apart": apart, "passed": apart == 0}


def check_row_scale() -> dict[str, Any]:
    """Rows and the sum of their squares; a row of zeros stays one."""
    worst = 0.0
    for (m, n), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        low_rank = torch.randn(2, m, max(1, n // 4))
        low_rank[1, 0] = 0
        x = torch.randn(m, n).to(dtype)
        ours = scale_rows_triton(*moved((*low_rank, x), CUDA))
        worst = max(worst, *map(relative, ours, scale_rows_reference(*low_rank, x)))
    return {"largest_relative_difference": worst, "passed": worst < 1e-5}


def check_dct() -> dict[str, Any]:
    """Columns of the matrix, and the squares that columns are ranked by."""
    columns = squares = 0.0
    for m, n in SHAPES:
        k, g = torch.randperm(n)[: max(1, n // 4)], torch.randn(m, n)
        ours = dct_columns_triton(n, k.to(CUDA), torch.float32, CUDA)
        columns = max(columns, relative(ours, dct_columns_reference(n, k, torch.float32, CPU)))
        squares = max(squares, relative(column_squares_triton(g.to(CUDA)), column_squares_reference(g)))
    passed = columns < 1e-6 and squares < 1e-4
    return {"columns_largest_difference": columns, "squares_largest_difference": squares, "passed": passed}


def relative(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    return float((ours.cpu() - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def moved(tree: Any, device: torch.device) -> Any:
    """Copies of the tensors of nested lists and tuples."""
    return tree.to(device, copy=True) if isinstance(tree, Tensor) else type(tree)(moved(item, device) for item in tree)


def check_parity() -> dict[str, Any]:
    """Three float64 steps of the harness on this GPU against the plain loop on the CPU, both from the initial numbers
    of the CPU: the float32 logarithm and cosine of Box-Muller differ between devices in the last place."""
    sys.path.insert(0, str(TESTS))
    import torch.distributed as dist

    from parity import assert_same, run_layout, run_plain, small_config, with_layout
    from rowwise.parallel.mesh import Workers
    from rowwise.trainer.models import init

    cpu = torch.device("cpu")
    init.normal = lambda key, start, count, device: normal_reference(key, start, count, cpu).to(device)
    with tempfile.TemporaryDirectory() as folder:
        config = small_config(Path(folder))
        try:
            trace = run_layout(Workers(), with_layout(config, 1, zero=3))
            for entries in (trace.gradients, trace.updates):
                entries[:] = [{name: t.cpu() for name, t in entry.items()} for entry in entries]
            assert_same(trace, run_plain(config))
        except AssertionError as error:
            return {"passed": False, "error": str(error)}
        finally:
            dist.destroy_process_group()
    return {"passed": True}


def time_philox(count: int = 1 << 28) -> dict[str, float]:
    """Gigabytes of float32 normals a second: the Triton kernel, and torch's own generator for comparison."""
    results = {}
    for name, draw in (
        ("philox_triton", lambda: normal(1, 0, count, CUDA)),
        ("torch_randn", lambda: torch.randn(count, device=CUDA)),
    ):
        draw()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            draw()
        torch.cuda.synchronize()
        results[f"{name}_gigabytes_per_second"] = 10 * count * 4 / (time.perf_counter() - started) / 1e9
    return results


def train(model: str, steps: int) -> dict[str, Any]:
    """A real run in bf16 on one GPU, through the command a user would give."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"model={model}", "precision=bf16", f"steps={steps}", "batch.global_size=32", "batch.micro_size=32",
            "batch.seq_len=1024", "eval.every=0", "sample.tokens=0", "checkpoint.every=0", f"run_dir={folder}/run",
        ]  # fmt: skip
        program = [sys.executable, "-m", "rowwise.launch.train", *overrides]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            return {"passed": False, "error": done.stderr[-2000:]}
        records = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    steady = records[len(records) // 2 :]
    middle = sorted(steady, key=lambda r: r["tokens_per_second"])[len(steady) // 2]
    keys = ("tokens_per_second", "mfu", "peak_memory_bytes")
    return {"passed": records[-1]["loss"] < records[0]["loss"], **{key: middle[key] for key in keys}}


CHECKS = {
    "attention": lambda: check_attention(CUDA),
    "philox": check_philox,
    "blockwise": check_blockwise,
    "adamw8bit": check_adamw8bit,
    "lion8bit": check_lion8bit,
    "rounding": check_rounding,
    "row_scale": check_row_scale,
    "dct": check_dct,
    "nm": lambda: check_nm(CUDA),
    "semi_structured": lambda: check_semi_structured(CUDA),
    "condensed": lambda: check_condensed(CUDA),
    "select": lambda: check_select(CUDA),
    "parity": check_parity,
}


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("refused: no CUDA GPU here; run this on a machine that has one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    checks = {name: check() for name, check in CHECKS.items()}
    print(json.dumps(checks, indent=1), flush=True)
    runs = {model: train(model, steps=40) for model in ("tiny", "llama_60m", "llama_130m", "llama_350m")}
    counted = optimizer_bytes.measure_bytes(["llama_130m", "llama_1b"])
    stepped = optimizer_step.measure_steps(optimizer_step.parse([]))
    kernels = {**time_philox(), "attention_seconds": time_attention(CUDA), "sparse": time_sparse(CUDA)}
    measured = {"checks": checks, "kernels": kernels, "training": runs}
    path = write_record("gpu", {**measured, "optimizer_step": stepped, "optimizer_bytes": counted})
    optimizer_step.print_tables(stepped)
    print(f"\nwritten: {path}")
    passed = [outcome["passed"] for outcome in [*checks.values(), *runs.values()]]
    return 0 if all([*passed, optimizer_bytes.passed(counted)]) else 1


if __name__ == "__main__":
    sys.exit(main())
