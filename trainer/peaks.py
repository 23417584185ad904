"""What a device can do at most, and the most that a process has held."""

import re
import resource
import sys

import torch

# Dense 16-bit peak FLOP/s by words of the device's name, from the vendors' data sheets; the first whose words are all there.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
}


def model_flops_utilization(flops_per_second: float, device: torch.device, peak: float | None = None) -> float | None:
    """Returns the share of the device's 16-bit `peak`, by default what its name says; None where that is not known (a CPU, say)."""
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))
    return flops_per_second / peak if peak else None


def peak_flops(device_name: str) -> float | None:
    """Returns the dense 16-bit peak FLOP/s of a GPU, by its name."""
    words = set(re.split(r"[ -]", device_name))
    return next((flops for key, flops in PEAK_FLOPS.items() if set(key.split()) <= words), None)


def device_name(device: torch.device) -> str:
    """Says what a worker computes on, as people call it: cpu, or H100 80GB HBM3."""
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most this process has held: of tensors on a GPU, of resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
