"""Whole runs as a user starts them: evaluated, sampled, killed and resumed, traced; and how fast steps of real models are."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from gpu_place import ROOT, NotPossibleHere, Place
from stepping import stepping
from torch.profiler import ProfilerActivity, profile

from rowwise.launch.compose import compose_tree
from rowwise.parallel.mesh import Workers
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.manifest import complete_checkpoints, read_manifest
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.models.decoder import flops_per_token
from rowwise.trainer.peaks import model_flops_utilization, peak_memory_bytes

SMALL = ("model.layers=2", "model.dim=64", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=128", "batch.seq_len=64",
         "batch.global_size=4", "batch.micro_size=2", "precision=fp32", "optim.lr=0.003")  # fmt: skip
QUIET = ("eval.every=0", "sample.tokens=0", "checkpoint.every=0", "log_every=1000")


def check_run(place: Place) -> dict[str, Any]:
    """A run that evaluates, saves and writes: its loss falls, and it says what the model writes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        asked = ("steps=12", "eval.every=6", "eval.batches=2", "sample.tokens=12", "checkpoint.every=6")
        said = finished(start(place, run, *SMALL, *asked))
        records = read_metrics(run)
        evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
        passed = records[-1]["loss"] < records[0]["loss"] and len(evaluated) == 2 and "the model writes" in said
        return {"passed": passed, "eval_losses": evaluated, "last_words": said[-300:], "last": records[-1]}


def check_kill_and_resume(place: Place) -> dict[str, Any]:
    """A run killed after a save goes on from it: the steps made twice have the same losses."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        asked = (
            "eval.every=0",
            "sample.tokens=0",
            "checkpoint.every=20",
            "schedule=constant",
            "schedule.warmup=0",
            "precision=fp64",
        )
        process = start(place, run, *SMALL, *asked, "steps=100000")
        until(lambda: 0 < saved(run) <= len(read_metrics(run)) - 4, process)
        kill(process)
        before, begins = [record["loss"] for record in read_metrics(run)], saved(run)
        finished(start(place, run, *SMALL, *asked, f"steps={len(before) + 2}"))
        after = [record["loss"] for record in read_metrics(run)]
        twice = [abs(ours / theirs - 1) for ours, theirs in zip(after[begins:], before[begins:], strict=False)]
        passed = len(after) == len(before) + 2 and bool(twice) and max(twice) < 1e-9
        return {"passed": passed, "saved": begins, "killed": len(before), "ended": len(after), "differences": twice}


def saved(run: Path) -> int:
    """The step of the newest checkpoint that is complete; 0 before the first."""
    return next((read_manifest(c)["step"] for c in complete_checkpoints(run / "checkpoints")), 0)


def check_tiny_as_given(place: Place) -> dict[str, Any]:
    """`rowwise train` as it stands, but for its length; on a GPU in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        short = SMALL if place.rehearsal else ("precision=bf16",)
        finished(
            start(place, run, *short, "steps=10" if place.rehearsal else "steps=60", "sample.tokens=0", alone=True)
        )
        records = read_metrics(run)
        keys = ("loss", "tokens_per_second", "mfu", "peak_memory_bytes", "step_seconds")
        return {"passed": records[-1]["loss"] < records[0]["loss"], **{key: records[-1][key] for key in keys}}


def start(place: Place, run: Path, *overrides: str, alone: bool = False) -> subprocess.Popen:
    """The command a user would give, in a session of its own, on every GPU up to two (`alone`: on one)."""
    world = 1 if alone else 2 if place.rehearsal else min(2, torch.cuda.device_count())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    program = [sys.executable, *torchrun, "-m", "rowwise.launch.train", f"run_dir={run}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)  # fmt: skip


def finished(process: subprocess.Popen, seconds: float = 150) -> str:
    """What it said, once it has ended well. Raises RuntimeError otherwise, TimeoutError where it does not end."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        raise TimeoutError(f"no end after {seconds} s: {said[-1500:]}") from None
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {said[-1500:]}")
    return said


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a run and its workers: those would save where only what started them was gone."""
    for worker in psutil.Process(process.pid).children(recursive=True):
        worker.kill()
    process.kill()
    process.communicate()


def until(happened, process: subprocess.Popen, seconds: float = 60) -> None:
    """Waits for something that a run does."""
    deadline = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"it did not come so far: {process.communicate()[0][-1500:]}")
        time.sleep(0.02)


def time_llama_1b(place: Place) -> dict[str, Any]:
    """Steps of the 1B model in bf16 on one GPU, not compiled: with what the device spent its time on."""
    return timed_steps(place, "llama_1b", profiled=True)


def time_llama_1b_compiled(place: Place) -> dict[str, Any]:
    """The same, each block compiled."""
    return timed_steps(place, "llama_1b", "compile=true")


def time_llama_1b_8bit(place: Place) -> dict[str, Any]:
    """The same under 8-bit AdamW."""
    return timed_steps(place, "llama_1b", "optim=adamw8bit", profiled=True)


def time_llama_1b_muon(place: Place) -> dict[str, Any]:
    """The same under Muon."""
    return timed_steps(place, "llama_1b", "optim=muon")


def time_llama_1b_packed(place: Place) -> dict[str, Any]:
    """The same, attention within documents."""
    return timed_steps(place, "llama_1b", "data.mask_documents=true", profiled=True)


def timed_steps(place: Place, model: str, *overrides: str, profiled: bool = False, steps: int = 6) -> dict[str, Any]:
    """Median seconds of a step, tokens per second, MFU and peak memory, of `steps` after two; then one under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [f"run_dir={folder}/run", *QUIET, *overrides]
        if place.rehearsal:
            config = resolved(*asked, *SMALL, "model.layers=1", "precision=bf16")
        else:
            config = resolved(
                *asked, f"model={model}", "precision=bf16", "batch.seq_len=2048", "batch.micro_size=4",
                "batch.global_size=8", "optim.lr=3e-4",
            )  # fmt: skip
        torch.manual_seed(0)
        with stepping(config, Workers()) as rank:
            seconds = []
            for number in range(steps + 2):
                began = time.perf_counter()
                report = rank.step(number + 1)
                place.wait()
                seconds.append(time.perf_counter() - began)
            middle = float(np.median(seconds[2:]))
            tokens = config.batch.global_size * config.batch.seq_len / middle
            flops = tokens * flops_per_token(config.model, config.batch.seq_len)
            found = {
                "passed": bool(np.isfinite(report.loss)),
                "step_seconds": [round(s, 4) for s in seconds],
                "tokens_per_second": tokens,
                "mfu": model_flops_utilization(flops, place.device),
                "peak_memory_bytes": peak_memory_bytes(place.device),
            }
            return found | ({"profile": profile_of(place, lambda: rank.step(steps + 3))} if profiled else {})


def resolved(*overrides: str) -> TrainConfig:
    """A run of one process."""
    return check(config_from_tree(compose_tree(list(overrides))), 1)


def profile_of(place: Place, step) -> dict[str, Any]:
    """Where one step's time went: the kernels that took most (ms), how long the device worked of the step, how many
    kernels were launched, and how often the host waited for the device."""
    kinds = [ProfilerActivity.CPU] if place.rehearsal else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as taken:
        began = time.perf_counter()
        step()
        place.wait()
        seconds = time.perf_counter() - began
    rows = taken.key_averages()
    here = "self_cpu_time_total" if place.rehearsal else "self_device_time_total"
    on_device = [row for row in rows if getattr(row, here) > 0 and (place.rehearsal or row.device_type.name == "CUDA")]
    slowest = sorted(on_device, key=lambda row: getattr(row, here), reverse=True)[:15]
    waits = sum(row.count for row in rows if re.search(r"(Stream|Device|Event)Synchronize", row.key))
    return {
        "step_seconds": seconds,
        "device_busy_seconds": sum(getattr(row, here) for row in on_device) / 1e6,
        "kernels": sum(row.count for row in on_device),
        "host_waits": waits,
        "slowest_ms": {row.key[:90]: [round(getattr(row, here) / 1e3, 3), row.count] for row in slowest},
    }


def time_saves(place: Place) -> dict[str, Any]:
    """How long a save of the 1B model blocks the loop, and how much slower the steps beside it are."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        model = SMALL if place.rehearsal else ("model=llama_1b", "precision=bf16", "batch.seq_len=1024",
                                               "batch.micro_size=4", "batch.global_size=4", "optim.lr=3e-4")  # fmt: skip
        saves = ("eval.every=0", "sample.tokens=0", "steps=24", "checkpoint.every=8", "checkpoint.keep=1")
        finished(start(place, run, *model, *saves, alone=True), seconds=200)
        records = read_metrics(run)
        return {
            "passed": True,
            "save_seconds": [record["save_seconds"] for record in records if "save_seconds" in record],
            "step_seconds": [round(record["step_seconds"], 4) for record in records],
        }


def time_models(place: Place) -> dict[str, Any]:
    """Steps of the smaller presets."""
    models = ("llama_60m", "llama_130m", "llama_350m")
    timed = {model: timed_steps(place, model) for model in (models[:1] if place.rehearsal else models)}
    return {"passed": all(found["passed"] for found in timed.values()), "models": timed}


def time_optimizers(place: Place) -> dict[str, Any]:
    """All of optimizer_step.py and optimizer_bytes.py."""
    if place.rehearsal:
        raise NotPossibleHere("each has its own results from a CPU: run it by itself")
    import optimizer_bytes
    import optimizer_step

    counted = optimizer_bytes.measure_bytes(["llama_130m", "llama_1b"])
    stepped = optimizer_step.measure_steps(optimizer_step.parse([]))
    return {"passed": optimizer_bytes.passed(counted), "optimizer_step": stepped, "optimizer_bytes": counted}
