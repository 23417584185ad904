"""Losses of a small decoder whose weights and gradients cross ranks with fewer bytes, beside those of the same run without.

    python benchmarks/quantised_messages.py                  2 x 2 ranks, width 64, 60 steps, 3 seeds: 3 minutes of two cores
    python benchmarks/quantised_messages.py --steps 400

Every run of a seed begins with the same numbers and reads the same bytes of the standard library; only `parallel.quantize_gather`,
`parallel.inner_shard` and `parallel.quantize_reduce` differ. The noise is what another seed makes of it: the standard deviation of
the plain runs' held-out losses. Nothing is said of time: four ranks of one machine have no slow axis.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import on_ranks
from record import write_record

from rowwise.launch.compose import compose_tree
from rowwise.parallel.mesh import Workers
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.metrics import read_metrics
from rowwise.trainer.prepare import prepare
from rowwise.trainer.train import train

RANKS = 4
FORMS = {
    "plain": (),
    "gather int8": ("parallel.quantize_gather=int8",),
    "reduce int8": ("parallel.quantize_reduce=int8",),
    "reduce int4": ("parallel.quantize_reduce=int4",),
    "all int4": ("parallel.quantize_gather=int8", "parallel.inner_shard=2", "parallel.quantize_reduce=int4"),
}
RUN = (
    "model=tiny", "model.layers=2", "model.dim=64", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=176", "data=stdlib",
    "batch.seq_len=64", "batch.global_size=16", "batch.micro_size=4", "precision=fp32", "parallel.zero=3", "optim.lr=3e-3",
    "schedule=cosine", "eval.batches=16", "sample.tokens=0", "checkpoint.every=0", "report=never", "resume=never",
)  # fmt: skip


def config_of(form: str, seed: int, steps: int, folder: str) -> TrainConfig:
    """Composes and checks a run."""
    mine = (
        f"seed={seed}",
        f"steps={steps}",
        f"eval.every={steps}",
        f"run_dir={folder}/{form.replace(' ', '_')}-{seed}",
    )
    return prepare(config_from_tree(compose_tree([*RUN, *FORMS[form], *mine])), RANKS)


def run_all(rank: int, ranks: int, port: int, configs: list[TrainConfig]) -> None:
    """Makes every run, one after the other."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    for number, config in enumerate(configs):
        workers = Workers(rank, ranks, rank, ranks, dist.PrefixStore(str(number), store))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(config, workers)
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank == 0:
            print(config.run_dir, flush=True)


def losses_of(config: TrainConfig) -> dict[str, Any]:
    """The training losses of a run, and its held-out loss at the end."""
    records = read_metrics(Path(config.run_dir))
    return {"losses": [record["loss"] for record in records if "loss" in record], "eval_loss": records[-1]["eval_loss"]}


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each form the mean held-out loss over seeds, by how much it is above the plain one of the same seed, on the mean and at most,
    and how far apart the training losses of a step are on the mean; the noise beside it."""
    plain = runs["plain"]
    noise = statistics.stdev(run["eval_loss"] for run in plain)
    found = {}
    for form, some in runs.items():
        above = [run["eval_loss"] - other["eval_loss"] for run, other in zip(some, plain, strict=True)]
        steps = [
            abs(a - b)
            for run, other in zip(some, plain, strict=True)
            for a, b in zip(run["losses"], other["losses"], strict=True)
        ]
        found[form] = {
            "eval_loss": statistics.mean(run["eval_loss"] for run in some),
            "above_plain": statistics.mean(above),
            "most_above_plain": max(above, key=abs),
            "step_difference": statistics.mean(steps),
            "noise": noise,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        configs = {form: [config_of(form, seed, given.steps, folder) for seed in given.seeds] for form in FORMS}
        on_ranks(run_all, RANKS, [config for some in configs.values() for config in some])
        runs = {form: [losses_of(config) for config in some] for form, some in configs.items()}
    compared = compare(runs)
    print(f"{'':12} {'held-out loss':>14} {'above plain':>12} {'at most':>9} {'a step':>8} {'noise':>8}")
    for form, row in compared.items():
        print(
            f"{form:12} {row['eval_loss']:14.4f} {row['above_plain']:+12.4f} {row['most_above_plain']:+9.4f} "
            f"{row['step_difference']:8.4f} {row['noise']:8.4f}"
        )
    print(
        write_record(
            "quantised_messages", {"steps": given.steps, "seeds": given.seeds, "compared": compared, "runs": runs}
        )
    )


if __name__ == "__main__":
    main()
