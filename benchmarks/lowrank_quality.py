"""The low-rank rules beside their authors' own classes: the held-out loss of a small decoder at equal settings.

    python benchmarks/lowrank_quality.py                        2 layers of width 64, 400 steps, 2 seeds: 6 minutes of a core
    python benchmarks/lowrank_quality.py --rules fira --seeds 0 1 2

Each rule runs with `optim.side=right`, with `optim.side=short` and as its authors wrote it, from the same initial numbers, on
the same batches of the standard library, byte by byte, with the same learning rate, rank, scale and refreshes: those of
conf/optim, but for the refresh, which is an eighth of the run. The schedule is their scripts': a tenth warms up, the rest is a
cosine down to a tenth. Embedding, head and vectors follow AdamW, and nothing decays. Without a package its column is missing:

    pip install --no-deps galore-torch==1.0 fira==1.0.2 apollo-torch==1.0.3 ista-daslab-optimizers==1.1.15

What stays different: the subspaces of galore and fira, which we find by iteration and they by SVD; the random projections of
apollo; DCTAdamW renews its columns at steps that its gap divides (we one later) and ranks them by sums of absolute values (we
by sums of squares). It is told to take the DCT-II of a row, as we do (sim_type=makhoul; its default takes the transpose), and
to move moments along with columns, which it does in place, reading what it has overwritten: that line is mended here.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import math
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from record import write_record
from torch import nn

from rowwise.kernels.spec import specs_of
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import build_optimizer
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.data.batches import MicroBatch, micro_batches
from rowwise.trainer.data.open import Data, open_data
from rowwise.trainer.data.order import sample_indices
from rowwise.trainer.models.decoder import Decoder
from rowwise.trainer.models.init import random_rows

RULES = ("galore", "dct", "fira", "apollo", "apollo_mini")
PACKAGES = {
    "galore": "galore-torch", "dct": "ista-daslab-optimizers", "fira": "fira",
    "apollo": "apollo-torch", "apollo_mini": "apollo-torch",
}  # fmt: skip
MODEL = [
    "model=tiny", "model.layers=2", "model.dim=64", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=176",
    "data=stdlib", "batch.seq_len=64", "batch.global_size=8", "batch.micro_size=8",
]  # fmt: skip
WAYS = ("right", "short", "authors")
HELD_OUT = 64  # batches
WITHIN = 0.03  # nats


def module_of(package: str, name: str) -> Any:
    """A module of an installed package whose `__init__`, which wants a GPU's libraries, is left aside."""
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None:
            raise ModuleNotFoundError(package)
        sys.modules[package] = importlib.util.module_from_spec(found)  # not executed
    return importlib.import_module(f"{package}.{name}")


def authors(rule: str, model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Their optimizer of the hidden matrices, and AdamW for the rest. Raises ModuleNotFoundError."""
    o: Any = config.optim
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    specs = specs_of(model)
    for name, p in model.named_parameters():
        groups[specs[name].role == "hidden"].append(p)
    adam = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps, "weight_decay": o.weight_decay}
    rest = torch.optim.AdamW(groups[False], **adam)
    rank = getattr(o, "rank", 1) or config.model.dim // 4
    if rule == "dct":
        columns = {"proj": "dct", "sim_type": "makhoul", "rotate_subspace": True, "update_proj_gap": o.refresh_every}
        module = module_of("ista_daslab_optimizers", "fft_low_rank.dct_adamw")
        theirs, module.FFTLowRankProjector.rotate_subspace = module.DCTAdamW, moved_along
        # It has one DCT matrix, of the first narrow side it meets.
        sides = sorted({min(p.shape) for p in groups[True]})
        alike = [[p for p in groups[True] if min(p.shape) == side] for side in sides]
        return [*(theirs(some, rank=rank, **columns, **adam) for some in alike), rest]
    low = {"params": groups[True], "rank": rank, "update_proj_gap": o.refresh_every, "proj_type": "std"}
    if rule == "galore":
        theirs, low = module_of("galore_torch", "adamw").AdamW, low | {"scale": o.scale}
    elif rule == "fira":
        theirs, low = module_of("fira", "fira_adamw").AdamW, low | {"alpha": o.scale}
    else:
        theirs = module_of("apollo_torch", "apollo").AdamW
        kind = "tensor" if rule == "apollo_mini" else "channel"
        low |= {"scale": o.scale, "proj": "random", "scale_type": kind}
    return [theirs([low], **adam, no_deprecation_warning=True), rest]


def moved_along(projector: Any, rotation: torch.Tensor, moment: torch.Tensor) -> None:
    """What their `rotate_subspace` is to do: a matrix product may not be written over its own operand."""
    moment.copy_(moment @ rotation if projector.is_right_proj else rotation @ moment)


def config_of(rule: str, side: str, steps: int) -> TrainConfig:
    refresh = f"optim.refresh_every={max(1, steps // 8)}"
    return config_from_tree(compose_tree([*MODEL, f"optim={rule}", f"optim.side={side}", refresh, f"steps={steps}"]))


def batch_of(config: TrainConfig, data: Data, seed: int, step: int) -> MicroBatch:
    size = config.batch.global_size
    return micro_batches(sample_indices(step * size, size, data.train.samples, f"train/{seed}"), data.train, size)[0]


def loss_of(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    return F.cross_entropy(model(batch.inputs, batch.positions).flatten(0, 1), batch.labels.flatten())


def factor(step: int, steps: int) -> float:
    """Of the learning rate."""
    warmup = steps // 10
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train_once(job: tuple[str, str, int, int]) -> float | None:
    """The held-out loss after a run of `rule`, `way` (right, short or authors), `seed` and `steps`. None: the authors' package
    is not installed."""
    rule, way, seed, steps = job
    torch.set_num_threads(1)
    config = config_of(rule, "right" if way == "authors" else way, steps)
    data = open_data(config.data, config.batch.seq_len, config.model.vocab_size)
    model = Decoder(config.model)
    fill_ = random_rows(model.parameter_specs(), seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill_(name, p, 0, p.size(0))
    try:
        ours = way != "authors"
        optimizers = [build_optimizer(model, config.optim, seed)] if ours else authors(rule, model, config)
    except ModuleNotFoundError:
        return None
    for step in range(steps):
        loss_of(model, batch_of(config, data, seed, step)).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.optim.lr * factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
    held_out, size = data.holdout, config.batch.global_size
    assert held_out is not None
    with torch.no_grad():
        batches = [
            micro_batches(torch.arange(i * size, (i + 1) * size).numpy(), held_out, size)[0] for i in range(HELD_OUT)
        ]
        return statistics.mean(loss_of(model, batch).item() for batch in batches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES, metavar="RULE", help=", ".join(RULES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, a core each")
    options = parser.parse_args()
    jobs = [(rule, way, seed, options.steps) for rule in options.rules for way in WAYS for seed in options.seeds]
    found: dict[str, dict[str, list[float]]] = {rule: {} for rule in options.rules}
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for (rule, way, seed, _), loss in zip(jobs, pool.map(train_once, jobs), strict=True):
            print(
                f"{rule}, {way}, seed {seed}: {'its package is missing' if loss is None else f'{loss:.4f}'}", flush=True
            )
            if loss is not None:
                found[rule].setdefault(way, []).append(loss)
    table = {rule: summary(rule, ways) for rule, ways in found.items()}
    print_table(table)
    setting = {"steps": options.steps, "seeds": options.seeds, "overrides": MODEL, "refresh_every": options.steps // 8}
    print(f"\nwritten: {write_record('lowrank_quality', {'setting': setting, 'rules': table})}")
    return 0 if all(row["within"] is not False for row in table.values()) else 1


def summary(rule: str, ways: dict[str, list[float]]) -> dict[str, Any]:
    """Losses by seed, their means, and the distance of the preset's side from the authors'."""
    row: dict[str, Any] = {"eval_loss": ways, "mean": {way: statistics.mean(losses) for way, losses in ways.items()}}
    tree = compose_tree([f"optim={rule}"])["optim"]
    row |= {"lr": tree["lr"], "scale": tree["scale"], "side": tree["side"], "within": None}
    if "authors" in ways:
        package = PACKAGES[rule]
        row |= {"authors": f"{package} {importlib.metadata.version(package)}"}
        row |= {f"{side}_minus_authors": row["mean"][side] - row["mean"]["authors"] for side in ("right", "short")}
        row["within"] = abs(row[f"{tree['side']}_minus_authors"]) <= WITHIN
    return row


def print_table(table: dict[str, dict[str, Any]]) -> None:
    print("\n| rule | side=right | side=short | the authors' class | right - theirs | short - theirs |")
    print("|---|---|---|---|---|---|")
    for rule, row in table.items():
        means = [f"{row['mean'].get(way, math.nan):.4f}" for way in WAYS]
        beside = [f"{row.get(f'{side}_minus_authors', math.nan):+.4f}" for side in ("right", "short")]
        print(f"| {' | '.join([rule, *means, *beside])} |{' MORE THAN 0.03' if row['within'] is False else ''}")


if __name__ == "__main__":
    sys.exit(main())
