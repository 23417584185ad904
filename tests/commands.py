"""The product's commands as processes: command lines of the small configuration, jobs started, watched and waited for."""

import importlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from parity import small_config, with_layout
from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import config_from_tree, tree_of
from rowwise.trainer.metrics import read_metrics
from runs import run_said

PATIENCE = 600  # seconds that nothing here takes on the busiest machine: it hangs
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def overrides_of(folder: Path, *more: str) -> list[str]:
    """The small configuration of the parity harness as command-line overrides."""
    tree = tree_of(small_config(folder))
    model = [
        f"model.{key}={tree['model'][key]}" for key in ("layers", "dim", "heads", "kv_heads", "ffn_dim", "vocab_size")
    ]
    data = ["data=tokens", f"data.files={tree['data']['files'][0]}", "data.separator=0", "data.mask_documents=true"]
    rest = [
        "batch.global_size=8",
        "batch.micro_size=2",
        "batch.seq_len=13",
        "eval.every=0",
        "sample.tokens=0",
        "log_every=1",
        "report=never",  # 2 seconds each, which tests of reports alone are there for
    ]
    return [f"run_dir={folder}/run", *model, *data, *rest, *more]


def command(workers: int, *program: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), *program]


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    log = (folder / "log").open("ab")
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run(folder: Path, arguments: list[str], timeout: float = PATIENCE) -> tuple[int, str]:
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def run_in_pool(ranks, overrides: list[str]) -> str:
    """The same run, where it does not matter what starts it; what rank 0 said."""
    return ranks.run(run_said, 2, with_layout(config_from_tree(compose_tree(overrides)), 2))[0]


def workers_of(job: subprocess.Popen) -> list[psutil.Process]:
    """Those of torchrun, or those that a warm process forked."""
    below = psutil.Process(job.pid).children(recursive=True)
    return [w for w in below if "rowwise.launch.train" in w.cmdline() or w.name().startswith("rowwise rank")]


class AtOnce:
    """In place of a warm process: calls what is asked of it here."""

    def ask(self, call: str, *arguments: Any) -> Any:
        module, _, name = call.partition(":")
        told: list[Any] = []
        getattr(importlib.import_module(module), name)(told.append, *arguments)
        return told[0]


def without_mlflow(folder: Path) -> str:
    """A path for PYTHONPATH on which mlflow is not installed: DeepSpeed's tuner would import it, in 1.3 s of every process."""
    (folder / "mlflow.py").write_text('raise ImportError("not in these tests")\n')
    return str(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def await_steps(folder: Path, steps: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(folder / "run")) < steps:
        assert job.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.01)
