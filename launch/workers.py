"""The workers that torchrun started: who this one is, and how rank 0 tells the others what to do.

They meet in torchrun's store, before any process group exists.
"""

import ctypes
import datetime
import json
import os
import platform
from typing import Any

import torch
from torch.distributed import rendezvous

from rowwise.parallel.mesh import Workers

_KEY = "rowwise/config"
_PATIENCE = datetime.timedelta(hours=4)  # rank 0 may have a corpus to tokenize first


def workers_from_environment() -> Workers:
    """This worker under torchrun; without torchrun, the only one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Workers()
    store, rank, world_size = next(rendezvous("env://", timeout=_PATIENCE))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Workers(rank, world_size, local_rank, local_world_size, store)


def announce(workers: Workers, tree: dict[str, Any] | None) -> None:
    """Rank 0 tells the others the resolved configuration, or None: there will be no run."""
    if workers.store is not None:
        workers.store.set(_KEY, json.dumps(tree))


def hear(workers: Workers) -> dict[str, Any] | None:
    """What rank 0 announced."""
    assert workers.store is not None
    return json.loads(workers.store.get(_KEY))


def keep_freed_memory() -> None:
    """On the CPU, tells glibc to keep the activations that a step frees, instead of giving them back to the kernel and
    faulting them in again, zeroed, at the next step: 25 ms a step of the default model. The peak stays what it is."""
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
