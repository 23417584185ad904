"""What `rowwise doctor` has two ranks exchange over each backend."""

import tempfile
import time
from pathlib import Path
from typing import Any

from rowwise.launch import health
from rowwise.launch.health import Finding
from rowwise.launch.rendezvous import interfaces
from rowwise.launch.warm import Child, Warm, WarmIsGone

PATIENCE_SECONDS = 60.0  # with what is tried


def try_backends(warm: Warm, gpus: int) -> list[Finding]:
    """Has two ranks exchange something over each backend."""
    found = [try_backend(warm, "gloo")]
    if gpus > 1:
        return [*found, try_backend(warm, "nccl")]
    return [*found, Finding("nccl", "not tried: two ranks need two GPUs")]


def try_backend(warm: Warm, backend: str) -> Finding:
    with tempfile.TemporaryDirectory(prefix="rowwise-doctor-") as place:
        logs = [(Path(place) / f"out-{rank}", Path(place) / f"err-{rank}") for rank in (0, 1)]
        environment = {**interfaces(), "OMP_NUM_THREADS": "1"}
        call, store = "rowwise.launch.patient:exchange", str(Path(place) / "store")
        ranks = [
            warm.start(call, rank, backend, store, environment=environment, logs=log) for rank, log in enumerate(logs)
        ]
        seconds = await_ranks(warm, ranks)
        if seconds is not None:
            return health.of_collective(backend, seconds["seconds"], seconds["bytes"])
        why = [line for _, err in logs for line in err.read_text(errors="replace").splitlines() if line.strip()]
        return health.of_collective(backend, None, 0, why[-1] if why else f"no answer in {PATIENCE_SECONDS:.0f} s")


def await_ranks(warm: Warm, ranks: list[Child]) -> dict[str, Any] | None:
    """Returns what rank 0 tells; None where it does not, and none is left."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while (
            any(rank.code is None for rank in ranks)
            and not any(rank.code for rank in ranks)
            and time.monotonic() < deadline
        ):
            warm.watch(0.1)
    except WarmIsGone:
        return None
    finally:
        for rank in ranks:
            rank.end(9)
    return ranks[0].told[0] if ranks[0].told else None
