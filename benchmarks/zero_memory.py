"""Bytes of states on each rank at every ZeRO stage: measured after every operation of a step, beside the formula.

python benchmarks/zero_memory.py                 llama_60m on 4 CPU ranks, stages 0 to 3
python benchmarks/zero_memory.py --model tiny --ranks 2
"""

import argparse
from dataclasses import asdict

import torch
import torch.distributed as dist
from processes import on_ranks
from record import write_record

from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.parallel.mesh import Workers, make_mesh
from rowwise.parallel.shard import merge_parts
from rowwise.parallel.state_bytes import PeakStates, count_parts, measure, predict
from rowwise.trainer.build import build_model
from rowwise.trainer.check import check
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.open import open_data
from rowwise.trainer.feed import train_batches
from rowwise.trainer.parallelize import parallelize
from rowwise.trainer.step import StepInput, compute_gradients

MICRO_BATCHES = 2
KINDS = ("shards", "gathered", "gradients", "optimizer", "buffers")


def one_rank(rank: int, ranks: int, port: int, config: TrainConfig) -> dict:
    """One step of `config`: this rank's bytes per parameter, between steps, at the peak, and as predicted."""
    torch.set_num_threads(1)
    mesh = make_mesh(config.parallel, Workers(rank, ranks, rank, ranks, dist.TCPStore("localhost", port)))
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    engine, _ = parallelize(build_model(config, mesh), config, mesh)
    model = engine.model
    parameters = sum(p.numel() for p in model.parameters())
    parts = count_parts(merge_parts(model.parts(), config.parallel.zero))
    optimizer = build_optimizer(model, config.optim)
    batches = next(train_batches(config, mesh, data, position=0))
    with PeakStates(model, optimizer) as states:
        compute_gradients(engine, mesh, StepInput(1, batches, config.batch.positions, config.clip_norm))
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    predicted = predict(parts, config.parallel.zero, len(batches))
    counted = {"between": measure(model, optimizer), "peak": states.peak, "predicted": predicted}
    dist.destroy_process_group()
    return {"parameters": parameters, "peak_of_all": states.total / parameters} | {
        name: {kind: count / parameters for kind, count in asdict(bytes_).items()} for name, bytes_ in counted.items()
    }


def run_stage(model: str, ranks: int, zero: int) -> dict:
    """Bytes per parameter of one stage."""
    overrides = [f"model={model}", f"parallel.zero={zero}", "batch.micro_size=1", "batch.seq_len=32"]
    tree = compose_tree([*overrides, f"batch.global_size={ranks * MICRO_BATCHES}"])
    config = check(config_from_tree(tree), ranks)
    return on_ranks(one_rank, ranks, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    stages = {zero: run_stage(options.model, options.ranks, zero) for zero in range(4)}
    n = options.ranks
    paper = {0: 16, 1: 8 + 8 / n, 2: 4 + 12 / n, 3: 16 / n}
    print(f"{options.model}, {stages[0]['parameters']:,} parameters, {n} ranks; bytes per parameter on rank 0")
    print("stage  between  " + "  ".join(f"{kind:>9}" for kind in KINDS) + "   at once   paper")
    for zero, found in stages.items():
        between = sum(found["between"][kind] for kind in KINDS[:4])
        for name in ("peak", "predicted"):
            cells = "  ".join(f"{found[name][kind]:9.3f}" for kind in KINDS)
            print(f"{zero if name == 'peak' else ' ':>5}  {between:7.3f}  {cells}", end="")
            print(f"  {found['peak_of_all']:8.3f}  {paper[zero]:6.2f}" if name == "peak" else "   (predicted)")
    setting = {"model": options.model, "ranks": n, "micro_batches": MICRO_BATCHES, "precision": "fp32"}
    write_record("zero_memory", {"setting": setting, "paper": paper, "stages": stages})


if __name__ == "__main__":
    main()
