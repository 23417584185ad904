"""Which form of a kernel runs: Triton on CUDA, the plain-torch reference elsewhere."""

import functools
import logging
import os

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def use_triton(device: torch.device) -> bool:
    """Says whether kernels on `device` run as Triton. ROWWISE_KERNELS=reference forces the references (for debugging)."""
    choice = os.environ.get("ROWWISE_KERNELS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"ROWWISE_KERNELS={choice!r}: possible are 'auto' and 'reference'")
    triton = device.type == "cuda" and choice == "auto"
    _log_once(device.type, "triton" if triton else "reference")
    return triton


def one_kernel(t: Tensor) -> bool:
    """Says whether arithmetic on each number or row of `t` is a kernel of Triton: not in 64 bits, and not where a compiler makes one
    of the plain form, and of what is around it."""
    return t.dtype != torch.float64 and not torch.compiler.is_compiling() and use_triton(t.device)


@functools.cache
def _log_once(device: str, form: str) -> None:
    log.info("kernels on %s: %s", device, form)
