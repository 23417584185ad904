"""How long people wait: for help, a refusal, a check, the first step of a run, and a sweep; ours beside torchrun, beside a bare
script, and, with --before, beside another checkout.

    python benchmarks/start.py --rounds 3
    git worktree add ../old COMMIT && python benchmarks/start.py --before ../old

What is measured is begun in turn, a round after the other, each in a folder of its own. A first step is there when what tells of it
is written: the first record of metrics.jsonl, or the bare script's file. Writes results/start.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import write_record

ROOT = Path(__file__).parents[1]
ROOMS = ("conf", "kernels", "launch", "optim", "parallel", "trainer")
ONE_STEP = ["steps=1", "schedule=constant", "schedule.warmup_steps=0", "eval.every=0", "sample.tokens=0", "run_dir=run"]
SWEPT = ["steps=4", "eval.every=0", "sample.tokens=0", "sweep.goal=loss", "sweep.folder=sweep", "nproc=1"]
GRID = ["optim.lr=1e-3,3e-3", "seed=1,2"]
TRAIN = ["-m", "rowwise.launch.cli", "train"]


@dataclass(frozen=True)
class Case:
    """A command, and the file whose first byte ends the wait (None: its end does)."""

    command: list[str]
    until: str | None = None
    code: int = 0


def cases() -> dict[str, Case]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    step = "run/metrics.jsonl"
    return {
        "help": Case([*TRAIN, "--help"]),
        "a mistyped key": Case([*TRAIN, "optim.lrr=3"], code=2),
        "--cfg": Case([*TRAIN, "--cfg"]),
        "a refusal": Case([*TRAIN, "nproc=1", "batch.global_size=15"], code=2),
        "check": Case(["-m", "rowwise.launch.cli", "check"]),
        "first step, a bare script": Case([str(ROOT / "benchmarks/start_bare.py"), "made"], "made"),
        "first step, python -m": Case(["-m", "rowwise.launch.train", *ONE_STEP], step),
        "first step, torchrun, 1 worker": Case([*torchrun, "1", "-m", "rowwise.launch.train", *ONE_STEP], step),
        "first step, rowwise train nproc=1": Case([*TRAIN, "nproc=1", *ONE_STEP], step),
        "first step, torchrun, 2 workers": Case([*torchrun, "2", "-m", "rowwise.launch.train", *ONE_STEP], step),
        "first step, rowwise train nproc=2": Case([*TRAIN, "nproc=2", *ONE_STEP], step),
        "a sweep of 2 x 2": Case(["-m", "rowwise.launch.cli", "sweep", *SWEPT, *GRID]),
    }


def measure(case: Case, environment: dict[str, str]) -> dict[str, float] | None:
    """Seconds until it is there, and those of processors until all that it started has ended; None where this checkout has no such
    command."""
    with tempfile.TemporaryDirectory(prefix="rowwise-start-") as folder:
        until = None if case.until is None else Path(folder) / case.until
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        with (Path(folder) / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *case.command], cwd=folder, env=environment, stdout=said, stderr=said
            )
            seconds = None
            while process.poll() is None:
                if seconds is None and until is not None and until.exists() and until.stat().st_size:
                    seconds = time.monotonic() - began
                time.sleep(0.005)
        seconds = seconds or time.monotonic() - began
        if process.returncode != case.code:
            told = (Path(folder) / "said").read_text()
            if "is no command" in told:
                return None
            raise RuntimeError(f"{case.command} ended with {process.returncode}: {told[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": seconds, "cpu_seconds": cpu, **sweep_facts(Path(folder) / "sweep")}


def sweep_facts(folder: Path) -> dict[str, float]:
    """The seconds of the steps and the saves of all its trials, which are what they are for."""
    if not folder.is_dir():
        return {}
    records = [
        json.loads(line) for path in folder.glob("trial-*/metrics.jsonl") for line in path.read_text().splitlines()
    ]
    return {"of_steps": sum(record["step_seconds"] for record in records), "records": len(records)}


def environment_of(checkout: Path) -> dict[str, str]:
    """In which `rowwise` is that of the checkout, and every process computes with one thread."""
    rooms = checkout / "build/rooms/rowwise"
    rooms.mkdir(parents=True, exist_ok=True)
    (rooms / "__init__.py").touch()  # else it comes after the package that is installed
    for room in ROOMS:
        (rooms / room).unlink(missing_ok=True)
        (rooms / room).symlink_to((checkout / room).resolve())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(rooms.parent.resolve())}
    asked = [sys.executable, "-P", "-c", "import rowwise.launch as room; print(room.__file__)"]
    found = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).resolve().is_relative_to(checkout.resolve()), f"{found} is measured, and not {checkout}"
    return environment


def measured(checkouts: dict[str, Path], rounds: int, chosen: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Checkout -> case -> median, least and all seconds, and the median of processor seconds."""
    environments = {name: environment_of(path) for name, path in checkouts.items()}
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in checkouts}
    for _ in range(rounds):
        for what, case in cases().items():
            for name, environment in environments.items() if chosen(what) else ():
                if (one := measure(case, environment)) is not None:
                    found[name].setdefault(what, []).append(one)
                    print(
                        f"{name:<8} {what:<36} {one['seconds']:6.2f} s  {one['cpu_seconds']:6.2f} s of processors",
                        flush=True,
                    )
    return {name: {what: summary(every) for what, every in by_case.items()} for name, by_case in found.items()}


def summary(every: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(one[key] for one in every) for key in every[0]}
    return {
        **medians,
        "least_seconds": min(one["seconds"] for one in every),
        "all_seconds": [one["seconds"] for one in every],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout, measured in the same turns")
    parser.add_argument("--only", default="", help="cases with these words")
    options = parser.parse_args()
    checkouts = {"before": options.before} if options.before else {}
    found = measured({**checkouts, "now": ROOT}, options.rounds, lambda what: options.only in what)
    print(f"\n{'':<36}" + "".join(f"{name:>20}" for name in found))
    for what in found["now"]:
        cells = [found[name].get(what) for name in found]
        print(
            f"{what:<36}"
            + "".join(f"{one['seconds']:>12.2f} ({one['cpu_seconds']:5.1f})" if one else " " * 20 for one in cells)
        )
    if not options.only:
        print(write_record("start", {"rounds": options.rounds, "seconds": found}))


if __name__ == "__main__":
    main()
