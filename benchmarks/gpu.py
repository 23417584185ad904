"""Every check and benchmark that needs a GPU, in one command and one results file.

    python benchmarks/gpu.py                   on a machine with one or more CUDA GPUs; within 9 minutes
    python benchmarks/gpu.py --long            and the long benchmarks
    python benchmarks/gpu.py --only NAME ...   some of them, kept beside what the file has (--list names all)
    python benchmarks/gpu.py --rehearse        the same sequence on the CPU with two gloo ranks at tiny sizes, in minutes

What tells most per minute comes first. Each check runs apart: one that fails, crashes or hangs costs its own seconds, and
`results/gpu.json` (`gpu_rehearsal.json`, which git ignores, in a rehearsal) is written after each. Two ranks are tried
wherever there are two GPUs, or one that NCCL shares. The exit code is 1 where anything failed.

A bare machine needs PyTorch, Triton, numpy and this repository; nothing is installed there. What else a run imports comes
along in a folder, made where there is a network, for the Python of that machine:

    python -m pip install --target vendor --constraint constraints.txt --no-deps --only-binary=:all: \\
        --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \\
        hydra-core omegaconf pydantic pydantic-core annotated-types typing-inspection typing-extensions \\
        filelock platformdirs tqdm pyyaml safetensors packaging psutil
    python -m pip install --target vendor --no-deps antlr4-python3-runtime==4.9.3
    PYTHONPATH=vendor python benchmarks/gpu.py
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_place import NotPossibleHere, Place, facts, make_importable


@dataclass(frozen=True)
class Check:
    """`function`: of a module beside this one; it takes the Place and gives a dict with `passed`. `seconds`: when it is
    given up."""

    name: str
    function: str
    seconds: int
    long: bool = False


CHECKS = [
    Check("first", "gpu_layouts:check_first", 60),
    Check("run", "gpu_runs:check_run", 60),
    Check("rules", "gpu_layouts:check_rules", 75),
    Check("zero", "gpu_layouts:check_zero", 75),
    Check("pipeline", "gpu_layouts:check_pipeline", 75),
    Check("sequence", "gpu_layouts:check_sequence", 75),
    Check("late", "gpu_layouts:check_late", 60),
    Check("traces", "gpu_layouts:check_traces", 75),
    Check("llama_1b", "gpu_runs:time_llama_1b", 75),
    Check("blockwise", "gpu_kernels:check_blockwise", 40),
    Check("adamw8bit", "gpu_kernels:check_adamw8bit", 40),
    Check("lion8bit", "gpu_kernels:check_lion8bit", 40),
    Check("philox", "gpu_kernels:check_philox", 20),
    Check("rounding", "gpu_kernels:check_rounding", 20),
    Check("row_codes", "gpu_kernels:check_row_codes", 20),
    Check("coded_rows", "gpu_kernels:check_coded_rows", 20),
    Check("row_scale", "gpu_kernels:check_row_scale", 20),
    Check("elementwise", "gpu_kernels:check_elementwise", 30),
    Check("dct", "gpu_kernels:check_dct", 30),
    Check("activation_codes", "gpu_activations:check_activation_codes", 40),
    Check("offload", "gpu_activations:check_offload", 40),
    Check("nm", "gpu_sparse:check_nm", 30),
    Check("semi_structured", "gpu_sparse:check_semi_structured", 30),
    Check("condensed", "gpu_sparse:check_condensed", 30),
    Check("select", "gpu_sparse:check_select", 20),
    Check("attention", "gpu_attention:check_attention", 60),
    Check("kill_and_resume", "gpu_runs:check_kill_and_resume", 90),
    Check("llama_1b_compiled", "gpu_runs:time_llama_1b_compiled", 100),
    Check("llama_1b_8bit", "gpu_runs:time_llama_1b_8bit", 60),
    Check("saves", "gpu_runs:time_saves", 120),
    Check("llama_1b_packed", "gpu_runs:time_llama_1b_packed", 60),
    Check("llama_1b_muon", "gpu_runs:time_llama_1b_muon", 60),
    Check("tiny", "gpu_runs:check_tiny_as_given", 60),
    Check("attention_speed", "gpu_attention:time_attention", 40),
    Check("philox_speed", "gpu_kernels:time_philox", 20),
    Check("sparse_speed", "gpu_sparse:time_sparse", 60, long=True),
    Check("models", "gpu_runs:time_models", 300, long=True),
    Check("optimizers", "gpu_runs:time_optimizers", 900, long=True),
]
TOTAL_SECONDS = 540  # after which nothing more is begun, without --long
PATIENCE = 5  # times as long in a rehearsal, on cores that others may use


class Worker:
    """A process that runs one check after the other, for as long as all goes well."""

    def __init__(self, place: Place):
        self._pipe, theirs = multiprocessing.Pipe()
        self._log = Path(tempfile.mkstemp(prefix="gpu-check-")[1])
        arguments = (theirs, place, str(self._log))
        self._process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        self._process.start()
        theirs.close()

    def run(self, check: Check, seconds: float) -> dict[str, Any]:
        """What the check found; where it did not end, what was last said."""
        self._pipe.send(check.function)
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
            error = f"no end after {seconds:.0f} s"
        except EOFError:
            self._process.join()
            error = f"its process died (exit code {self._process.exitcode})"
        return {"passed": False, "error": error, "said": self._log.read_text(errors="replace")[-3000:]}

    def close(self) -> None:
        """Ends it, and the processes that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        except ProcessLookupError:  # it ended before it had a group of its own
            self._process.kill()
        self._process.join()
        self._log.unlink()


def work(pipe: Any, place: Place, log: str) -> None:
    """The life of a worker."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    make_importable()
    import torch

    while True:
        try:
            module, _, name = pipe.recv().partition(":")
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            found = getattr(importlib.import_module(module), name)(place)
        except NotPossibleHere as reason:
            found = {"not_possible": str(reason)}
        except BaseException:
            found = {"passed": False, "error": traceback.format_exc()[-3000:]}
        pipe.send(found)


def run_checks(checks: list[Check], place: Place, keep: Any, total_seconds: float) -> dict[str, Any]:
    """What each found, with its seconds; `keep` is given all that is found after each."""
    found: dict[str, Any] = {}
    began, worker = time.monotonic(), None
    for check in checks:
        left = total_seconds - (time.monotonic() - began)
        if left < min(10, check.seconds):
            found[check.name] = {"not_possible": f"{total_seconds:.0f} s were over; --only {check.name} runs it"}
            continue
        worker = worker or Worker(place)
        started = time.monotonic()
        outcome = worker.run(check, min(check.seconds, left))
        found[check.name] = outcome | {"seconds": round(time.monotonic() - started, 2)}
        if outcome.get("passed") is False:  # what a fault leaves behind is not the next check's
            worker.close()
            worker = None
        keep(found)
        print(line(check.name, found[check.name]), flush=True)
    if worker is not None:
        worker.close()
    return found


def line(name: str, outcome: dict[str, Any]) -> str:
    """One line of the table."""
    if "not_possible" in outcome:
        return f"{name:20s} {'-':>7s} {outcome.get('seconds', 0):8.1f} s   {outcome['not_possible']}"
    verdict = "passed" if outcome["passed"] else "FAILED"
    reason = str(outcome.get("error", "")).strip().splitlines()[-1:] or failing(outcome)
    return f"{name:20s} {verdict:>7s} {outcome['seconds']:8.1f} s   {'; '.join(reason)[:160]}".rstrip()


def failing(outcome: dict[str, Any]) -> list[str]:
    """The cases that do not hold."""
    cases = outcome.get("cases", {})
    return [
        f"{case}: {found['outcome'].splitlines()[-1]}" for case, found in cases.items() if found["outcome"] != "holds"
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--long", action="store_true", help="the long benchmarks too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[check.name for check in CHECKS], default=[])
    parser.add_argument("--list", action="store_true", help="print the checks and leave")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.list:
        for check in CHECKS:
            print(f"{check.name:20s} {check.seconds:4d} s   {check.function}{'   --long' if check.long else ''}")
        return 0
    if options.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from record import RESULTS, write_record

    if not options.rehearse and not torch.cuda.is_available():
        print("refused: no CUDA GPU here; run this on a machine that has one, or give --rehearse", file=sys.stderr)
        return 2
    chosen = [c for c in CHECKS if c.name in options.only] or [c for c in CHECKS if options.long or not c.long]
    name, known = "gpu_rehearsal" if options.rehearse else "gpu", {"gpu": facts()}
    began, file = time.monotonic(), RESULTS / f"{name}.json"
    before = json.loads(file.read_text())["checks"] if options.only and file.exists() else {}

    def keep(found: dict[str, Any]) -> Path:
        return write_record(name, {**known, "seconds": round(time.monotonic() - began, 1), "checks": before | found})

    print(json.dumps(known), flush=True)
    if options.rehearse:
        chosen = [replace(check, seconds=PATIENCE * check.seconds) for check in chosen]
    unbounded = options.long or options.only or options.rehearse
    seconds = sum(check.seconds for check in chosen) if unbounded else TOTAL_SECONDS
    found = run_checks(chosen, Place(options.rehearse), keep, seconds)
    path = keep(found)
    print("\n" + "\n".join(line(name, outcome) for name, outcome in found.items()))
    print(f"\n{time.monotonic() - began:.0f} s; written: {path}")
    return 1 if any(outcome.get("passed") is False for outcome in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
