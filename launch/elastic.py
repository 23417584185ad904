"""The agent of torchrun, for one of several machines: they meet, and workers elsewhere that are lost are done without. It begins
workers anew, each with imports of its own."""

import contextlib
import logging
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rowwise.launch.job import Job
from rowwise.launch.local import LEAVING_SECONDS
from rowwise.launch.outcome import Failure, WorkersFailed
from rowwise.launch.rendezvous import address_towards
from rowwise.launch.rendezvous_backend import rendezvous_handler, settings

LAST_SECONDS = 2.0  # that the host of the rendezvous stays after its own workers


def run_agent(job: Job, ended: "queue.SimpleQueue[BaseException | None]") -> None:
    """Runs the workers of this machine, and says through `ended` that they have left, or why: WorkersFailed, Ended, or another.

    It does not handle signals, and may run in a thread.
    """
    # How it ended is said by who hears of it, in a word.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        # Whoever gives up sooner than the workers do does so while they still may go on.
        assert job.rendezvous is not None
        with rendezvous_handler(job.rendezvous, max(60, job.timeout_seconds)) as make, _logs(job) as logs:
            program = ("-m", "rowwise.launch.train", *job.arguments)
            elastic_launch(_launch_config(job, make, logs), sys.executable)(*program)
            if job.rendezvous.host:
                time.sleep(LAST_SECONDS)  # for those that come last
        ended.put(None)
    except ChildFailedError as error:
        ended.put(WorkersFailed([failure_of(failure) for failure in error.failures.values()]))
    except BaseException as error:
        ended.put(error)


def failure_of(failure: ProcessFailure) -> Failure:
    """Returns the failure of a worker, as torch's `record` kept it."""
    message = failure.message
    return Failure(failure.exitcode, str(message.get("message", message) if isinstance(message, dict) else message))


@contextlib.contextmanager
def _logs(job: Job) -> Iterator[DefaultLogsSpecs]:
    """Where workers leave what they say, and why they failed. torch would leave a folder behind for each run."""
    if job.log_dir is not None:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        yield DefaultLogsSpecs(log_dir=str(job.log_dir), redirects=Std.ALL)
        return
    with tempfile.TemporaryDirectory(prefix="rowwise-", ignore_cleanup_errors=True) as folder:
        yield DefaultLogsSpecs(log_dir=folder, redirects=Std.NONE)


def _launch_config(
    job: Job, make: Callable[[RendezvousParameters], RendezvousHandler], logs: DefaultLogsSpecs
) -> LaunchConfig:
    options: dict[str, Any] = {}
    if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)):  # not in torch 2.11
        options["shutdown_timeout"] = LEAVING_SECONDS
    rendezvous = job.rendezvous
    assert rendezvous is not None
    return LaunchConfig(
        min_nodes=rendezvous.least,
        max_nodes=rendezvous.most,
        nproc_per_node=job.nproc,
        run_id=rendezvous.job,
        logs_specs=logs,
        local_addr=address_towards(*rendezvous.address),
        max_restarts=job.max_restarts,
        **settings(make),
        **options,
    )
