"""Every check and benchmark that needs a GPU, in one command and one results file.

    python benchmarks/gpu.py                on a machine with one or more CUDA GPUs; writes results/gpu.json

Checks: the Triton kernels against their references on the device, and three float64 steps on the GPU against one
plain CPU process. Figures: the speed of the kernels, and tokens per second, MFU and peak memory
of a real run on one GPU in bf16. A check that fails is in the file, and the exit code is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write_record

from rowwise.kernels.philox import normal, normal_reference, stream_key

CUDA = torch.device("cuda")
TESTS = Path(__file__).parents[1] / "tests"


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


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("refused: no CUDA GPU here; run this on a machine that has one", file=sys.stderr)
        return 2
    checks = {"philox": check_philox(), "parity": check_parity()}
    runs = {model: train(model, steps=40) for model in ("tiny", "llama_60m", "llama_130m", "llama_350m")}
    path = write_record("gpu", {"checks": checks, "kernels": time_philox(), "training": runs})
    print(path.read_text())
    return 0 if all(outcome["passed"] for outcome in [*checks.values(), *runs.values()]) else 1


if __name__ == "__main__":
    sys.exit(main())
