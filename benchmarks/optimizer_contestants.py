"""Who races in `optimizer_step.py`: our rules and others' optimizers over the same parameters; their clock and memory.

Others are imported where they are built, and only there: each may be missing.
"""

import ctypes
import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optimizer_bytes import LOW_RANK, optim_config, storage_bytes
from record import spread
from torch import Tensor, nn

from rowwise.kernels.spec import specs_of
from rowwise.optim.build import build_optimizer, set_step

REFRESH_EVERY = 200
ADAM = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}  # small, so that parameters stay near where they were
DECAY = 0.1
PEERS = {
    "torch": "torch fused AdamW",
    "bitsandbytes": "bitsandbytes AdamW8bit",
    "torchao": "torchao AdamW8bit",
    "galore-torch": "galore-torch",
}


class Contestant:
    """An optimizer and its times. `renew` makes the next step one that renews the projection."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, renew: Callable[[], None] | None = None):
        self._optimizer, self._device, self._renew = optimizer, device, renew
        self.first_step_seconds = self._timed()  # with whatever is built or compiled in it
        self.steps: list[float] = []
        self.refreshes: list[float] = []

    def ordinary(self) -> None:
        self.steps.append(self._timed())

    def refresh(self) -> None:
        if self._renew is not None:
            self._renew()
            self.refreshes.append(self._timed())

    def figures(self, parameters: int) -> dict[str, Any]:
        """Seconds and bytes."""
        found = {"step_seconds": spread(self.steps), "first_step_seconds": self.first_step_seconds}
        if self.refreshes:
            refresh, step = statistics.median(self.refreshes), statistics.median(self.steps)
            found["refresh_seconds"] = {"median": refresh, "all": self.refreshes}
            found["per_step_seconds"] = step + (refresh - step) / REFRESH_EVERY
        found["state_bytes_per_parameter"] = storage_bytes(tensors_in(self._optimizer.state)) / parameters
        found["extra_bytes"] = held_beside(self._optimizer.step, self._device)
        return found

    def _timed(self) -> float:
        return seconds_of(self._optimizer.step, self._device)


def ours(rule: str, model: nn.Module, rank: int, device: torch.device) -> Contestant:
    optimizer = build_optimizer(model, optim_config(rule, rank, lr=ADAM["lr"]))
    renew = (lambda: set_step(optimizer, REFRESH_EVERY)) if rule in LOW_RANK else None
    return Contestant(optimizer, device, renew)


def peer(name: str, model: nn.Module, rank: int, device: torch.device) -> Contestant:
    """Raises whatever it raises where it is not installed or does not run here."""
    specs, (hidden, matrices, vectors) = specs_of(model), ([], [], [])
    for key, p in model.named_parameters():
        {"hidden": hidden, "vector": vectors}.get(specs[key].role, matrices).append(p)
    groups = [{"params": hidden + matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    if name == "torch":
        return Contestant(torch.optim.AdamW(groups, **ADAM, fused=True), device)
    if name == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return Contestant(AdamW8bit(groups, **ADAM), device)
    if name == "torchao":
        from torchao.optim import AdamW8bit as OtherAdamW8bit  # pyright: ignore[reportMissingImports]

        return Contestant(OtherAdamW8bit(groups, **ADAM), device)
    from galore_torch import GaLoreAdamW

    low_rank = {"rank": rank, "update_proj_gap": REFRESH_EVERY, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": hidden, "weight_decay": DECAY, **low_rank}, {**groups[0], "params": matrices}, groups[1]]
    contestant = Contestant(GaLoreAdamW(groups, **ADAM, no_deprecation_warning=True), device)
    contestant.refreshes.append(contestant.first_step_seconds)
    return contestant


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_beside(step: Callable[[], Any], device: torch.device) -> int | None:
    """The most that a call holds beside what there was: of the allocator on a GPU, of resident memory on Linux."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the C library answers from memory that it kept
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def tensors_in(value: Any) -> list[Tensor]:
    """Every plain tensor in an optimizer's state: in dicts, in torchao's tensors, in galore-torch's projectors."""
    if isinstance(value, Tensor):
        names = getattr(value, "tensor_attrs", None)
        return [value] if names is None else [t for name in names for t in tensors_in(getattr(value, name))]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    return tensors_in(getattr(value, "ortho_matrix", {}))


def find_peers(decoder: nn.Module, rank: int, device: torch.device) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that make their first step here, and the reasons of the others."""
    found, missing = {}, {}
    for package, name in PEERS.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                found[name] = peer(package, decoder, rank, device)
        except Exception as error:  # whatever another package may raise
            text = str(error).strip().splitlines() or [""]
            missing[name] = f"{type(error).__name__}: {text[0][:300]}"
    return found, missing


def versions() -> dict[str, str]:
    found = {}
    for package in PEERS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
