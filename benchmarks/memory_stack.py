"""One model, options added one at a time: the most bytes that a rank holds at once, and tokens per second, at each rung.

python benchmarks/memory_stack.py                                        llama_60m, 2 ranks (GPUs where there are enough, else CPU)
python benchmarks/memory_stack.py --model llama_1b --ranks 1 --seq-len 4096 --precision bf16
python benchmarks/memory_stack.py --only plain,full                      some of the rungs

A rung has what those above it have. Bytes are torch's own count of a GPU's memory, or on the CPU those of all tensors that live:
parameters, states, gradients, activations, messages. A step is forward, backward and update of every micro-batch.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from processes import on_ranks
from record import write_record
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from rowwise.kernels.torch_dispatch import TorchDispatchMode
from rowwise.kernels.torch_dtensor import rows_of
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.trainer.build import build_model
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.step import StepInput
from rowwise.trainer.update import make_update

# In their order.
RUNGS: dict[str, dict[str, object]] = {
    "plain": {"optim": "adamw", "parallel.zero": 0, "memory.fused_loss": "false"},
    "fused loss": {"memory.fused_loss": "true"},
    "adamw8bit": {"optim": "adamw8bit"},
    "selective": {"memory.recompute": "selective"},
    "share": {"memory.recompute": 0.4},
    "full": {"memory.recompute": "full"},
    "zero 1": {"parallel.zero": 1},
    "zero 3": {"parallel.zero": 3},
}
STEPS = 2  # that are timed


@dataclass(frozen=True)
class Size:
    """What every rung trains."""

    model: str
    ranks: int
    seq_len: int
    micro_size: int
    micro_batches: int
    precision: str

    def config(self, options: dict[str, object]) -> TrainConfig:
        size = self.ranks * self.micro_size * self.micro_batches
        mine = [f"model={self.model}", f"precision={self.precision}", "eval.every=0", "sample.tokens=0"]
        mine += [f"batch.seq_len={self.seq_len}", f"batch.micro_size={self.micro_size}", f"batch.global_size={size}"]
        return check(config_from_tree(compose_tree([*mine, *(f"{k}={v}" for k, v in options.items())])), self.ranks)


class Live(TorchDispatchMode):
    """While entered, the most bytes of storages that live at once: of `given`, and of what operations make. A storage has the
    size that it has when it is counted: FSDP2 empties those of parameters that are not gathered, and fills them again."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}
        self.peak = 0
        self._count(given)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._count(t for t in tree_leaves(result) if isinstance(t, Tensor))
        return result

    def _count(self, tensors: Iterable[Tensor]) -> None:
        for t in map(rows_of, tensors):
            key = t.untyped_storage()._cdata
            if key not in self._known or self._known[key].expired():
                self._known[key] = StorageWeakRef(t.untyped_storage())
        found = {key: torch.UntypedStorage._new_with_weak_ptr(known.cdata) for key, known in self._known.items()}
        self._known = {key: self._known[key] for key, storage in found.items() if storage is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in found.values() if storage is not None))


def one_rank(rank: int, ranks: int, port: int, config: TrainConfig) -> dict:
    """A few steps of `config`: this rank's bytes at the height of one, and tokens per second of all ranks."""
    torch.set_num_threads(1)
    mesh = make_mesh(config.parallel, Workers(rank, ranks, rank, ranks, dist.TCPStore("localhost", port)))
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    engine, sparsity = parallelize(build_model(config, mesh), config, mesh)
    optimizer = build_optimizer(engine.model, config.optim, config.seed)
    update = make_update(config, mesh, engine, optimizer, sparsity)
    batches = train_batches(config, mesh, data, position=0)

    def step(number: int) -> None:
        update(StepInput(number, next(batches), config.batch.positions, config.clip_norm))
        optimizer.zero_grad()

    step(1)
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(2)
        peak = torch.cuda.max_memory_allocated()
    else:
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        with Live([*engine.model.parameters(), *states]) as live:
            step(2)
        peak = live.peak
    dist.barrier()
    began = time.perf_counter()
    for number in range(STEPS):
        step(3 + number)
    dist.barrier()
    seconds = time.perf_counter() - began
    dist.destroy_process_group()
    tokens = STEPS * config.batch.global_size * config.batch.seq_len
    return {"peak_bytes": peak, "tokens_per_second": tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--micro-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument(
        "--only", default=",".join(RUNGS), help="names of rungs, the first of which all others are beside"
    )
    given = parser.parse_args()
    size = Size(given.model, given.ranks, given.seq_len, given.micro_size, given.micro_batches, given.precision)
    print(f"{size.model} in {size.precision}, {size.ranks} ranks, {size.micro_size} x {size.seq_len} tokens a forward")
    print(f"{'rung':12} {'bytes at once':>16} {'of plain':>9} {'tokens/s':>10}")
    options: dict[str, object] = {}
    rungs: dict[str, dict] = {}
    for name, added in RUNGS.items():
        options |= added
        if name not in given.only.split(","):
            continue
        rungs[name] = {"options": dict(options)} | on_ranks(one_rank, size.ranks, size.config(options))
        first, now = next(iter(rungs.values())), rungs[name]
        share = now["peak_bytes"] / first["peak_bytes"]
        print(f"{name:12} {now['peak_bytes']:16,} {share:9.3f} {now['tokens_per_second']:10,.0f}", flush=True)
    print(write_record("memory_stack", {"size": vars(size), "rungs": rungs}))


if __name__ == "__main__":
    main()
