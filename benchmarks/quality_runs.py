"""Runs of `optimizer_quality.py` and `sparse_quality.py`: processes that each make one after the other, and a file of those
that are finished."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rowwise.launch.compose import compose_tree
from rowwise.trainer.check import check
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.prepare import prepare
from rowwise.trainer.train import train

Overrides = tuple[str, ...]
ROOMS = ("conf", "kernels", "optim", "parallel", "trainer")


@functools.cache
def digest_of(overrides: Overrides) -> str:
    """Of every setting of a run and of the code that makes it. Raises ValueError for what cannot run."""
    tree = compose_tree(list(overrides))
    check(config_from_tree(tree), 1)
    return hashlib.sha256(json.dumps([tree, digest_of_code()], sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def digest_of_code() -> str:
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def serve() -> None:
    """Makes one run for every line of overrides on stdin, and answers with a line; ends with stdin."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        answers.write(json.dumps(train_once(json.loads(line))) + "\n")


def train_once(overrides: list[str]) -> dict[str, Any]:
    """One run. A loss that is no number is null: the rate was too high."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(config_from_tree(compose_tree([*overrides, f"run_dir={folder}/run"])), 1)
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            contextlib.suppress(FloatingPointError),
        ):
            if train(config).step < config.steps:
                sys.exit(1)  # asked to stop
        records = read_metrics(Path(config.run_dir))
    if dist.is_initialized():  # a run that failed leaves its groups
        dist.destroy_process_group()
    loss = records[-1].get("eval_loss") if records else None
    tokens = config.steps * config.batch.global_size * config.batch.seq_len
    finite = loss is not None and math.isfinite(loss)
    return {"eval_loss": loss if finite else None, "tokens": tokens, "seconds": time.perf_counter() - started}


class Kept:
    """The finished runs of a JSON-lines file."""

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found = {found["digest"]: found for found in map(_parsed, lines) if found}

    def get(self, overrides: Overrides) -> dict[str, Any] | None:
        return self._found.get(digest_of(overrides))

    def add(self, overrides: Overrides, answer: dict[str, Any]) -> None:
        found = {"digest": digest_of(overrides), "overrides": overrides, **answer}
        self._found[found["digest"]] = found
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(found) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    """A line may have been cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def make_runs(needed: Callable[[], dict[str, Overrides]], kept: Kept, processes: int, gpu: bool = False) -> None:
    """Makes the runs that are `needed`, so many `processes` at a time, until none is: each by what it is called, and what is
    needed may depend on what is kept. Ends the program where it is interrupted."""
    try:
        with ThreadPoolExecutor(processes) as threads, servers(processes, gpu) as idle:
            while runs := needed():
                try:
                    _keep_all(runs, threads, idle, kept)
                except BaseException:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the runs that are finished")


def _keep_all(runs: dict[str, Overrides], threads: ThreadPoolExecutor, idle: queue.Queue, kept: Kept) -> None:
    asked = {threads.submit(ask, overrides, idle): name for name, overrides in runs.items()}
    for number, future in enumerate(as_completed(asked), 1):
        name, answer = asked[future], future.result()
        kept.add(runs[name], answer)
        print(f"{number}/{len(runs)}  {name}  {answer['eval_loss']}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def servers(count: int, gpu: bool) -> Iterator[queue.Queue]:
    """`count` processes that `serve`, idle; on the CPU each with one thread. They end with this context."""
    threads = {} if gpu else {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=os.environ | threads, start_new_session=True)
        for _ in range(count)
    ]  # fmt: skip
    idle: queue.Queue = queue.Queue()
    for process in started:
        idle.put(process)
    try:
        yield idle
    finally:
        for process in started:
            process.terminate()
            process.wait()


def ask(overrides: Overrides, idle: queue.Queue) -> dict[str, Any]:
    process = idle.get()
    process.stdin.write(json.dumps(overrides) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    idle.put(process)
    if not answer:
        raise RuntimeError(f"the process of {overrides} has ended; what it said stands above")
    return json.loads(answer)


if __name__ == "__main__":
    serve()
