"""The workers that torchrun started: who this one is, and how rank 0 tells the others what to do.

They meet in torchrun's store, before any process group exists.
"""

import contextlib
import ctypes
import datetime
import json
import os
import platform
import queue
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import rendezvous

from rowwise.launch.forked import Telling
from rowwise.launch.gate import LOOPBACK
from rowwise.launch.outcome import Ended, Failed, Refused
from rowwise.launch.rendezvous import LOGGED, START, interfaces
from rowwise.launch.warm import Child
from rowwise.parallel.mesh import Workers

ANSWER_SECONDS = 2.0  # that the store is given to say why others ended
MESSAGES_FILE = "collectives-rank-"  # and the rank's number
_KEPT_MESSAGES = 2000
_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_KEY = "config"
_WATCH_SECONDS = 1.0
_END = "end"
_MEET_SECONDS = 0.02
_MEETING = datetime.timedelta(minutes=5)  # from the first worker's start to the last one's
_LISTENING = datetime.timedelta(seconds=10)
_PATIENCE = datetime.timedelta(hours=4)  # rank 0 may have a corpus to tokenize first


def workers_from_environment() -> Workers:
    """Returns this worker under torchrun; without torchrun, the only one.

    What it opens for others to connect to is on the loopback where the run has one machine, unless the environment names an
    interface.
    """
    if not is_one_of_many_machines():
        for name, value in interfaces().items():
            os.environ.setdefault(name, value)
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Workers()
    if START in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        shared: dist.Store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_MEETING)
        shared.set_timeout(_PATIENCE)
        store: dist.Store = dist.PrefixStore(f"rowwise/{os.environ[START]}", shared)
    else:
        shared, rank, world_size = next(rendezvous("env://", timeout=_MEETING))
        store = _meet(shared, rank, world_size)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Workers(rank, world_size, local_rank, local_world_size, store)


def are_logged() -> bool:
    """Says whether the agent keeps what each worker says."""
    return LOGGED in os.environ


def store_here() -> dist.TCPStore:
    """Opens a store that this machine alone can reach. torch would have it listen on every address."""
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def host_store(tell: Telling, client: int) -> None:
    """Keeps a store for the workers of this machine, whose port it tells, until one of those ends it that see the workers
    leave: its client, or its parent where that is gone. Where both are, it leaves."""
    store, parent, asking = store_here(), os.getppid(), Child(client)
    tell(store.port)
    tell.close()
    while os.getppid() == parent or asking.is_there():
        time.sleep(_WATCH_SECONDS)


def _meet(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of `store` for those alone who meet here. torchrun keeps one store over all restarts, and what is in it from
    before (a configuration, addresses of processes that are gone) must not be taken for now. Nothing that torchrun tells
    its workers is the same on every machine and new after every restart, so rank 0 draws a name for this start. Each of
    the others asks for it under a name of its own; rank 0 answers until all have said that they have it, because the name
    it finds may be that of a worker that is gone."""
    mine = uuid.uuid4().hex
    if rank == 0:
        start, missing = mine, list(range(1, world_size))
        while missing:
            for other in missing:
                store.set(f"rowwise/start/{store.get(f'rowwise/name/{other}').decode()}", start)
            time.sleep(_MEET_SECONDS)
            missing = [other for other in missing if not store.check([f"rowwise/{start}/{other}"])]
    else:
        store.set(f"rowwise/name/{rank}", mine)
        start = store.get(f"rowwise/start/{mine}").decode()
        store.set(f"rowwise/{start}/{rank}", "here")
    store.set_timeout(_PATIENCE)
    return dist.PrefixStore(f"rowwise/{start}", store)


def restarted() -> bool:
    """Says whether this job's workers have been started before: by torchrun, or by Slurm, which queued the job again."""
    return any(os.environ.get(f"{who}_RESTART_COUNT", "0") != "0" for who in ("TORCHELASTIC", "SLURM"))


def job_id() -> str | None:
    """Returns what torchrun calls the job, on every machine and after every restart; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def is_one_of_many_machines() -> bool:
    """Says whether torchrun has workers of this run on other machines."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1


def announce(workers: Workers, tree: dict[str, Any]) -> None:
    """Tells the other ranks, from rank 0, the resolved configuration."""
    if workers.store is not None:
        workers.store.set(_KEY, json.dumps({"config": tree}))


def announce_end(workers: Workers, end: Ended) -> None:
    """Tells the other ranks, from rank 0, why there will be no run, and stays until they know: the store may end with this
    process."""
    if workers.store is None:
        return
    workers.store.set(_KEY, json.dumps({end.state: str(end)}))
    with contextlib.suppress(RuntimeError):  # one that is gone does not hear
        workers.store.wait([_heard(rank) for rank in range(1, workers.world_size)], _LISTENING)


def hear(workers: Workers) -> dict[str, Any]:
    """Returns what rank 0 announced. Raises Refused or Failed."""
    assert workers.store is not None
    told = json.loads(workers.store.get(_KEY))
    workers.store.set(_heard(workers.rank), "")
    for end in (Refused, Failed):
        if end.state in told:
            raise end(told[end.state])
    return told["config"]


def _heard(rank: int) -> str:
    return f"heard/{rank}"


def share_end(workers: Workers, reason: str | None) -> str | None:
    """Says why the run ended, for a worker that failed: what some worker has already given as the reason, or `reason`, which is
    then given to the others. They fail for want of this one, and know no better. A store that does not answer for
    `ANSWER_SECONDS` knows nothing: a host that was cut off would wait for as long as its kernel does, a quarter of an hour."""
    if (store := workers.store) is None:
        return reason
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: said.put(_asked(store, reason)), daemon=True).start()
    try:
        return said.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        return reason


def _asked(store: dist.Store, reason: str | None) -> str | None:
    try:
        if reason is None:
            return store.get(_END).decode() if store.check([_END]) else None
        return store.compare_set(_END, "", reason).decode()
    except RuntimeError:  # the store ended with rank 0
        return reason


def keep_freed_memory() -> None:
    """Tells glibc, on the CPU, to keep the activations that a step frees, instead of giving them back to the kernel and
    faulting them in again, zeroed, at the next step: 25 ms a step of the default model. A run
    whose rows wait in files takes it back (`parallel.away`)."""
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def tell_gpu(run_dir: Path) -> None:
    """Sets `gpu_settings` for this process, where there are GPUs. Call it before a process group or a tensor is made."""
    if torch.cuda.is_available():
        os.environ.update(gpu_settings(run_dir.resolve(), os.environ))


def gpu_settings(run_dir: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Returns what torch reads in the environment, where `given` does not say it: memory grows in place, since steps of many sizes
    would leave gaps; and where a message waits longer than `parallel.timeout_seconds`, each rank writes its last ones into
    the run's folder."""
    settings = (
        {} if any(name in given for name in _ALLOCATOR_NAMES) else {_ALLOCATOR_NAMES[0]: "expandable_segments:True"}
    )
    for name, older, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", str(_KEPT_MESSAGES)),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(run_dir / MESSAGES_FILE)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ):
        if name not in given and older not in given:
            settings[name] = value
    return settings


def tell_accelerate(workers: Workers) -> None:
    """Sets what Accelerate and DeepSpeed read in the environment, where nothing stands: who this worker is, and that it computes on
    the CPU where there is no GPU. Nothing of them may have been imported."""
    told = {"RANK": workers.rank, "WORLD_SIZE": workers.world_size, "LOCAL_RANK": workers.local_rank}
    told["LOCAL_WORLD_SIZE"] = workers.local_world_size
    for name, value in told.items():
        os.environ.setdefault(name, str(value))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
