"""Which form of a kernel runs: Triton on CUDA; on the host numba, where it is installed and there is enough to compute; the
plain-torch reference elsewhere."""

import functools
import importlib
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WORTH_NUMBA = 1 << 18  # numbers: those of fewer are done before numba is imported


def use_triton(device: torch.device) -> bool:
    """Says whether kernels on `device` run as Triton. ROWWISE_KERNELS=reference forces the references (for debugging)."""
    triton = _is_free() and device.type == "cuda"
    _log_once(device.type, "triton" if triton else "reference")
    return triton


def use_numba(changed: Sequence[Tensor]) -> bool:
    """Says whether a kernel that changes these tensors, all of one dtype, runs as compiled by numba: on the host, not in 64 bits.
    Both forms give the same numbers, so that ranks which hold more or fewer rows may differ in it."""
    if not changed or changed[0].device.type != "cpu" or changed[0].dtype == torch.float64:
        return False
    return all(t.is_contiguous() for t in changed) and is_compiled(sum(t.numel() for t in changed))


def is_compiled(count: int) -> bool:
    """Says whether a kernel on so many numbers on the host, contiguous and not of 64 bits, runs as compiled by numba."""
    return _is_free() and count >= WORTH_NUMBA and host_kernels() is None


@functools.cache
def host_kernels() -> str | None:
    """Says why kernels on the host are plain torch; None where numba compiles them. Imports numba: a third of a second."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return f"numba is not there ({error}): pip install 'rowwise[host]'"
    log.info("kernels on cpu, from %d numbers on: numba", WORTH_NUMBA)
    return None


def _is_free() -> bool:
    choice = os.environ.get("ROWWISE_KERNELS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"ROWWISE_KERNELS={choice!r}: possible are 'auto' and 'reference'")
    return choice == "auto"


def one_kernel(t: Tensor) -> bool:
    """Says whether arithmetic on each number or row of `t` is a kernel of Triton: not in 64 bits, and not where a compiler makes one
    of the plain form, and of what is around it."""
    return t.dtype != torch.float64 and not torch.compiler.is_compiling() and use_triton(t.device)


@functools.cache
def _log_once(device: str, form: str) -> None:
    log.info("kernels on %s: %s", device, form)
