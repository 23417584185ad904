"""One rank of a contestant of `peers.py`: its script as it stands, with a clock on its steps and on its saves.

    torchrun --nproc-per-node 2 benchmarks/peer_rank.py CONTESTANT FOLDER

In FOLDER: `model`, `tokens.bin`, `rows.bin`, and the socket of who waits; `out` will be there.
"""

import csv
import functools
import importlib
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "peers"
RANKS, SEQUENCES, SEQ_LEN = 2, 16, 256  # SEQUENCES a step, over all ranks
STEPS, WARMUP, TURN, SAVE_EVERY = 24, 4, 4, 8
TURNS = (STEPS - WARMUP) // TURN  # every second begins with the save of the step before it
DEEPSPEED_STEP = "deepspeed:DeepSpeedEngine.step"
OURS = "rowwise.trainer.checkpoint:Saver.save"


@dataclass(frozen=True)
class Contestant:
    """`script`: its file in peers/. `saves`: the functions in which the loop stands while it saves; `steps`: the one that makes a step
    (None: torch.optim's own). `losses`: reads those of all steps from what it leaves. `beside`: the native run that splits as much.
    `options`: of ours, beside those in the file. `before`: what a processor asks for and a GPU would not."""

    script: str
    saves: tuple[str, ...]
    losses: Callable[[Path], list[float]]
    steps: str | None = None
    beside: str = "native"
    options: tuple[str, ...] = ()
    before: Callable[[], None] = lambda: None

    def lines(self) -> int:
        """Counts what its user writes: neither blank lines nor imports nor what is said about it; of ours, each option is a line."""
        text = (SCRIPTS / self.script).read_text()
        code = re.sub(r'^""".*?"""$', "", text, count=1, flags=re.DOTALL | re.MULTILINE).splitlines()
        written = [line for line in code if line and not line.startswith(("import ", "from ", "#"))]
        return len(written) + len(self.options)

    def run(self, folder: Path) -> Any:
        """Trains, and returns when all is over: what must not be let go of before this process ends."""
        out, model = folder / "out", folder / "model"
        if self.script.endswith(".py"):
            sys.argv = [self.script, str(model), str(folder / "rows.bin"), str(out)]
            return runpy.run_path(str(SCRIPTS / self.script), run_name="__main__")
        from rowwise.launch.train import main

        given = (f"model.init_from={model}", f"data.files=[{folder / 'tokens.bin'}]", f"run_dir={out}", "report=never")
        if code := main([f"config={SCRIPTS / self.script}", *given, *self.options]):
            sys.exit(code)
        return None


def printed(folder: Path) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", (folder / "log").read_text(), re.MULTILINE)]


def recorded(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "out/metrics.jsonl").read_text().splitlines()]


def in_trainer_state(folder: Path) -> list[float]:
    state = json.loads((folder / f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def in_csv(folder: Path) -> list[float]:
    with (folder / "out/lightning_logs/version_0/metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def over_gloo() -> None:
    """DeepSpeed would compile messages of its own for processors at the first start."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fsdp_on_processors() -> None:
    """Accelerate has FSDP for accelerators alone: it is told that this is one, and computes where the model is."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


_NATIVE = functools.partial(Contestant, "native.yaml", (OURS,), recorded)
CONTESTANTS = {
    "native": _NATIVE(),
    "native, zero=0": _NATIVE(options=("parallel.zero=0",)),
    "native, zero=3": _NATIVE(options=("parallel.zero=3",)),
    "native through DeepSpeed": Contestant(
        "native.yaml",
        ("rowwise.trainer.accelerate.states:DeepSpeedStates.read", OURS),
        recorded,
        steps=DEEPSPEED_STEP,
        options=("parallel.backend=accelerate",),
    ),
    "DeepSpeed": Contestant(
        "deepspeed_zero1.py", ("deepspeed:DeepSpeedEngine.save_checkpoint",), printed, DEEPSPEED_STEP, before=over_gloo
    ),
    "Accelerate, DDP": Contestant(
        "accelerate_ddp.py", ("accelerate:Accelerator.save_state",), printed, beside="native, zero=0"
    ),
    "Accelerate, FSDP2": Contestant(
        "accelerate_fsdp2.py",
        ("accelerate:Accelerator.save_state",),
        printed,
        beside="native, zero=3",
        before=fsdp_on_processors,
    ),
    "transformers Trainer": Contestant(
        "transformers_trainer.py", ("transformers:Trainer._save_checkpoint",), in_trainer_state, beside="native, zero=0"
    ),
    "Lightning": Contestant(
        "lightning_ddp.py", ("lightning.pytorch:Trainer.save_checkpoint",), in_csv, beside="native, zero=0"
    ),
}


class Clock:
    """Counts steps and takes turns: after WARMUP steps, and after every TURN steps from then on, this rank tells what it measured and
    waits until it may go on."""

    def __init__(self, race: Connection):
        self._race, self._steps, self._blocked = race, 0, 0.0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def tick(self, *_: Any) -> None:
        self._steps += 1
        if self._steps == 1:
            self._race.send({"first_step_at": time.time()})
        if self._steps < WARMUP or (self._steps - WARMUP) % TURN:
            return
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._race.send({"wall": wall, "cpu": cpu, "blocked": self._blocked, "peak_bytes": peak_bytes()})
        if self._steps < STEPS:
            self._race.recv()
        self._wall, self._cpu, self._blocked = time.perf_counter(), time.process_time(), 0.0

    def follow(self, contestant: Contestant) -> None:
        """Begins: imports what it looks at, which the contestant would import."""
        if contestant.steps is None:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            register_optimizer_step_post_hook(self.tick)
        else:
            around(contestant.steps, lambda seconds: self.tick())
        for name in contestant.saves:
            around(name, self._add)

    def _add(self, seconds: float) -> None:
        self._blocked += seconds


def around(name: str, then: Callable[[float], None]) -> None:
    """Has `module:Class.method` tell `then` how long each call of it took."""
    module, _, path = name.partition(":")
    kind, _, method = path.partition(".")
    owner = getattr(importlib.import_module(module), kind)
    plain = getattr(owner, method)

    @functools.wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = plain(*args, **kwargs)
        then(time.perf_counter() - began)
        return result

    setattr(owner, method, timed)


def peak_bytes() -> int:
    """The most memory that this process has had resident; what came before its program began is not in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    contestant = CONTESTANTS[name]
    contestant.before()
    with Client(str(folder / "race")) as race:
        clock = Clock(race)
        clock.follow(contestant)
        _kept = contestant.run(folder)
    assert clock._steps == STEPS, f"rank {os.environ['RANK']} of {name} made {clock._steps} steps instead of {STEPS}"
    sys.stdout.flush()
    sys.stderr.flush()
    # torch 2.13 may stop here for ever: a DDP model that ends joins gloo's thread, which waits for Python to let go of a tensor.
    os._exit(0)


if __name__ == "__main__":
    main()
