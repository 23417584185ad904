"""Where the time of a step goes: torch's profiler over chosen steps and ranks, and which rank holds up the others.

    runs/NAME/profile/rank-N.trace.json.gz    the trace, for chrome://tracing and Perfetto
    runs/NAME/profile/rank-N.json             {rank, device, steps, seconds, parts: {kind: seconds a step}}

The seconds of a step are parted by what is at work, in this order, so that the parts are all of it:

    attention      what is computed inside attention
    products       of matrices
    elementwise    everything else that is computed, and copies
    messages       from or to other ranks are under way, and nothing is computed
    idle           nothing of these: the device waits for the host (on a CPU: what is no operation of torch), or for data

A rank's own seconds are those of a step without `messages`: while those are under way it waits for others. The rank with the
most holds up all; it costs what it takes longer than the median rank.
"""

import gzip
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.profiler import profile  # what torch.profiler stands on, which imports the compiler as it starts

from rowwise.parallel.mesh import Mesh
from rowwise.trainer.config import TrainConfig
from rowwise.trainer.files import to_json, write_whole, writing

KINDS = ("attention", "products", "elementwise", "messages", "idle")
FOLDER = "profile"

ATTENTION = re.compile(r"attention|flash|fmha", re.IGNORECASE)
PRODUCTS = re.compile(
    r"^aten::(mm|addmm|bmm|baddbmm|mv|addmv|dot|_scaled_mm|_sparse_semi_structured\w*)$|gemm|gemv|cutlass|cublas|nvjet|xmma"
)
MESSAGES = re.compile(r"^(gloo|nccl|mpi|ucc):|^nccl(Dev)?Kernel")
OPERATION = re.compile(r"^(aten|rowwise)::")


class Event(NamedTuple):
    """An event of a profile, in nanoseconds. `device`: something that an accelerator did."""

    name: str
    start: int
    end: int
    device: bool


def parts_of(events: Iterable[Event], start: int, end: int) -> dict[str, float]:
    """Counts the seconds between `start` and `end` by kind; their sum is all of it. Where an accelerator did anything, what it
    did."""
    found = list(events)
    if any(event.device for event in found):
        found = [event for event in found if event.device]
        computed = [event for event in found if not MESSAGES.search(event.name)]
    else:
        computed = [event for event in found if OPERATION.search(event.name)]
    messages = [event for event in found if MESSAGES.search(event.name)]
    attention = [event for event in found if ATTENTION.search(event.name)]
    products = [event for event in found if PRODUCTS.search(event.name)]

    def covered(*some: Sequence[Event]) -> int:
        return union([(event.start, event.end) for events in some for event in events], start, end)

    # |A and C| = |A| + |C| - |A or C|
    compute = covered(computed)
    in_attention = covered(attention) + compute - covered(attention, computed)
    in_both = covered(attention, products) + compute - covered(attention, products, computed)
    at_work = covered(computed, messages)
    parts = (in_attention, in_both - in_attention, compute - in_both, at_work - compute, end - start - at_work)
    return dict(zip(KINDS, (part / 1e9 for part in parts), strict=True))


def union(spans: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """Says how much of [start, end) these cover together."""
    if not spans:
        return 0
    clipped = np.clip(np.array(sorted(spans), dtype=np.int64), start, end)
    reached = np.maximum.accumulate(clipped[:, 1])
    before = np.concatenate(([start], reached[:-1]))
    return int(np.maximum(reached - np.maximum(clipped[:, 0], before), 0).sum())


def slowest(seconds: Sequence[float]) -> dict[str, Any]:
    """Returns what a record says of the ranks' own seconds: the rank with the most, those, and the median rank's."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    return {
        "slowest_rank": rank,
        "slowest_rank_seconds": seconds[rank],
        "median_rank_seconds": statistics.median_low(seconds),
    }


class Profiler:
    """Profiles the steps of a run that `profile.steps` and `log.ranks_every` name: `begin` before each, `end` after it. As a
    context, it keeps what it has of steps that end early."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._profile: profile | None = None
        self._steps: list[int] = []

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._profile is not None:
            profiled = self._stop()
            if kind is None:
                self._keep(*profiled)

    def begin(self, step: int) -> None:
        """Starts where `step` is one of those."""
        if self._profile is None and (self._traces(step) or self._compares(step)):
            device = self._mesh.device.type
            self._profile = profile(use_cpu=True, use_device=None if device == "cpu" else device, use_kineto=True)
            self._profile.__enter__()
            self._started = now_ns(self._mesh.device)

    def end(self, step: int) -> dict[str, Any]:
        """Stops after the last of `profile.steps`, which are then kept; in steps of `log.ranks_every`, one all-reduce of a
        float64 a rank over all ranks, and what the record then says."""
        if self._compares(step):
            profiled, start, end = self._stop()
            mine = end - start - 1e9 * parts_of(events_of(profiled), start, end)["messages"]
            return slowest(self._of_every_rank(mine / 1e9))
        if self._profile is not None:
            self._steps.append(step)
            if step >= self._config.profile.steps[-1]:
                self._keep(*self._stop())
        return {}

    def _traces(self, step: int) -> bool:
        choice = self._config.profile
        return choice.of(step) and (choice.ranks is None or self._mesh.rank in choice.ranks)

    def _compares(self, step: int) -> bool:
        """On all ranks alike."""
        return self._config.log.with_ranks(step, self._config.length) and not self._config.profile.of(step)

    def _stop(self) -> tuple[profile, int, int]:
        assert self._profile is not None
        profiled, self._profile = self._profile, None
        end = now_ns(self._mesh.device)
        profiled.__exit__(None, None, None)
        return profiled, self._started, end

    def _keep(self, profiled: profile, start: int, end: int) -> None:
        """Writes the trace of this rank and its summary. Raises DiskFull."""
        steps, self._steps = self._steps, []
        if not steps:  # the run failed in the first
            return
        folder = Path(self._config.run_dir) / FOLDER
        folder.mkdir(exist_ok=True)
        trace = folder / f"rank-{self._mesh.rank}.trace.json"
        with writing(trace):
            profiled.export_chrome_trace(str(trace))
            trace.with_name(f"{trace.name}.gz").write_bytes(gzip.compress(trace.read_bytes(), compresslevel=5))
            trace.unlink()
        parts = parts_of(events_of(profiled), start, end)
        summary = {
            "rank": self._mesh.rank,
            "device": self._mesh.device.type,
            "steps": [steps[0], steps[-1]],
            "seconds": (end - start) / 1e9 / len(steps),
            "parts": {kind: seconds / len(steps) for kind, seconds in parts.items()},
        }
        write_whole(folder / f"rank-{self._mesh.rank}.json", to_json(summary, indent=1) + "\n")

    def _of_every_rank(self, seconds: float) -> list[float]:
        everyone = torch.zeros(self._mesh.world_size, dtype=torch.float64, device=self._mesh.device)
        everyone[self._mesh.rank] = seconds
        dist.all_reduce(everyone)
        found: list[float] = everyone.tolist()
        return found


def now_ns(device: torch.device) -> int:
    """Returns the time by the profiler's clock, once the stream of the step has done what it was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.time_ns()


def events_of(profiled: profile) -> list[Event]:
    """Returns what happened while it ran. Of an accelerator not what only names a stretch of time."""
    results = profiled.kineto_results
    assert results is not None
    cpu = torch.autograd.DeviceType.CPU
    return [
        Event(one.name(), one.start_ns(), one.start_ns() + one.duration_ns(), one.device_type() != cpu)
        for one in results.events()
        if one.device_type() == cpu or not one.is_user_annotation()
    ]
