"""Which form of a kernel runs: Triton on CUDA, the plain-torch reference elsewhere."""

import functools
import logging
import os

import torch

log = logging.getLogger(__name__)


def use_triton(device: torch.device) -> bool:
    """Says whether kernels on `device` run as Triton. ROWWISE_KERNELS=reference forces the references (for debugging)."""
    choice = os.environ.get("ROWWISE_KERNELS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"ROWWISE_KERNELS={choice!r}: possible are 'auto' and 'reference'")
    triton = device.type == "cuda" and choice == "auto"
    _log_once(device.type, "triton" if triton else "reference")
    return triton


@functools.cache
def _log_once(device: str, form: str) -> None:
    log.info("kernels on %s: %s", device, form)
