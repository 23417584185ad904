"""Validation loss after the same number of tokens, for every optimizer at its own best learning rate.

    python benchmarks/optimizer_quality.py                       on 2 cores 30 to 40 minutes; interrupt it and go on later
    python benchmarks/optimizer_quality.py --rules adamw muon --steps 800 --model model.layers=4 model.dim=256
    python benchmarks/optimizer_quality.py --gpu                 llama_60m in bf16, 105 million tokens a run

Every run is the product's own: `trainer.prepare`, then `trainer.train`, on the `stdlib` corpus, byte by byte, with the
settings of conf/optim but for the learning rate, and the rank and its refresh, which follow the model and the length of
the run. Each rule runs with seed 0 at FACTORS times the rate of its preset; while the best is the lowest or the highest
of them, the next one beyond is tried too, at most `--beyond` times. The best then runs with the other seeds. A seed is
that of the initial weights, of the order of the data and of random projections, so losses of two rules are compared
seed by seed. All runs end with the whole held-out text.

Finished runs are kept in results/optimizer_quality.jsonl with a digest of their settings and of the code that made
them; what is there with the same digest is not run again. The picture needs matplotlib (`pip install rowwise[bench]`).
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from optimizer_bytes import RULES
from quality_runs import Kept, digest_of, make_runs
from record import RESULTS, write_record

from rowwise.launch.compose import compose_tree
from rowwise.trainer.config import config_from_tree

WITH_RANK = ("galore", "dct", "fira", "apollo")
WITH_REFRESH = (*WITH_RANK, "apollo_mini")
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of the rate in conf/optim
SEEDS = (0, 1, 2)
ALWAYS = ["data=stdlib", "checkpoint.every=0", "sample.tokens=0", "eval.batches=1000000", "resume=never"]
CPU = [
    "model=tiny", "model.layers=2", "model.dim=128", "model.ffn_dim=352",
    "batch.seq_len=128", "batch.global_size=16", "batch.micro_size=16",
]  # fmt: skip
GPU = [
    "model=llama_60m", "model.vocab_size=256", "precision=bf16",
    "batch.seq_len=512", "batch.global_size=512", "batch.micro_size=64",
]  # fmt: skip
Run = tuple[str, float, int]  # rule, learning rate, seed


def overrides_of(run: Run, options: argparse.Namespace) -> tuple[str, ...]:
    """The command line of a run, but for its folder."""
    rule, lr, seed = run
    own = [
        f"optim={rule}",
        f"optim.lr={lr:.6g}",
        f"seed={seed}",
        f"steps={options.steps}",
        f"eval.every={options.steps}",
    ]
    if rule in WITH_RANK:
        own.append(f"optim.rank={options.rank}")
    if rule in WITH_REFRESH:
        own.append(f"optim.refresh_every={options.refresh_every}")
    return (*ALWAYS, *(GPU if options.gpu else CPU), *own, *options.model)


def preset(rule: str) -> float:
    """The learning rate of the preset, for a model as small as these."""
    return config_from_tree(compose_tree([f"optim={rule}"])).optim.lr


def loss_of(run: Run, kept: Kept, options: argparse.Namespace) -> float | None:
    """None: not run yet. Infinite: it diverged."""
    found = kept.get(overrides_of(run, options))
    return None if found is None else math.inf if found["eval_loss"] is None else found["eval_loss"]


def tune(rule: str, kept: Kept, options: argparse.Namespace) -> tuple[dict[float, float], list[Run]]:
    """The losses by learning rate, and the runs that tuning still needs."""
    rates = [factor * preset(rule) for factor in options.factors]
    step = rates[1] / rates[0] if len(rates) > 1 else 2.0
    for attempt in range(options.beyond + 1):
        losses = {rate: loss_of((rule, rate, SEEDS[0]), kept, options) for rate in rates}
        missing = [(rule, rate, SEEDS[0]) for rate, loss in losses.items() if loss is None]
        if missing or attempt == options.beyond:
            break
        best = min(losses, key=losses.__getitem__)
        if best not in (rates[0], rates[-1]):
            break
        rates = [rates[0] / step, *rates] if best == rates[0] else [*rates, rates[-1] * step]
    return losses, missing


def needed(rule: str, kept: Kept, options: argparse.Namespace) -> list[Run]:
    """The runs of a rule that can be made now."""
    losses, missing = tune(rule, kept, options)
    if missing:
        return missing
    best = min(losses, key=losses.__getitem__)
    return [(rule, best, seed) for seed in SEEDS if loss_of((rule, best, seed), kept, options) is None]


def all_needed(kept: Kept, options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The runs of all rules that can be made now."""
    runs = [run for rule in options.rules for run in needed(rule, kept, options)]
    return {f"{rule}  lr {lr:.6g}  seed {seed}": overrides_of((rule, lr, seed), options) for rule, lr, seed in runs}


def summarise(kept: Kept, options: argparse.Namespace) -> dict[str, Any]:
    """rule -> its best rate, all that were tried, and the losses of the seeds there, also beside those of AdamW."""
    found: dict[str, Any] = {}
    for rule in options.rules:
        losses, _ = tune(rule, kept, options)
        best = min(losses, key=losses.__getitem__)
        runs = [kept.get(overrides_of((rule, best, seed), options)) for seed in SEEDS]
        seeds = [loss_of((rule, best, seed), kept, options) for seed in SEEDS]
        found[rule] = {
            "lr": best, "preset_lr": preset(rule), "at_the_edge": best in (min(losses), max(losses)),
            "tried": {f"{rate:.6g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()},
            "eval_loss": seeds, "mean": statistics.mean(seeds), "standard_deviation": statistics.stdev(seeds),
            "tokens": runs[0]["tokens"], "seconds": statistics.median(run["seconds"] for run in runs),
        }  # fmt: skip
    for row in found.values():
        if "adamw" in found:
            beside = [a - b for a, b in zip(row["eval_loss"], found["adamw"]["eval_loss"], strict=True)]
            row["minus_adamw"] = {"mean": statistics.mean(beside), "standard_deviation": statistics.stdev(beside)}
    return found


def print_table(found: dict[str, Any]) -> None:
    print("\n| rule | lr | x preset | validation loss | standard deviation | minus adamw, seed by seed | seconds |")
    print("|---|---|---|---|---|---|---|")
    for rule, row in sorted(found.items(), key=lambda item: item[1]["mean"]):
        edge = " (edge of the grid)" if row["at_the_edge"] else ""
        beside = row.get("minus_adamw")
        against = f"{beside['mean']:+.4f} ± {beside['standard_deviation']:.4f}" if beside else ""
        print(f"| {rule} | {row['lr']:.3g}{edge} | {row['lr'] / row['preset_lr']:.3g} | {row['mean']:.4f} "
              f"| {row['standard_deviation']:.4f} | {against} | {row['seconds']:.0f} |")  # fmt: skip


def draw(found: dict[str, Any], setting: str) -> Path | None:
    """A dot a seed, a bar at the mean; the best at the top. None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = sorted(found.items(), key=lambda item: -item[1]["mean"])
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.6), layout="constrained")
    for height, (_, row) in enumerate(rows):
        axes.plot(row["eval_loss"], [height] * len(row["eval_loss"]), "o", color="tab:blue", alpha=0.6, markersize=6)
        axes.plot([row["mean"]], [height], "|", color="black", markersize=16)
    if "adamw" in found:
        axes.axvline(found["adamw"]["mean"], color="gray", linewidth=0.8, linestyle="--", label="adamw, mean")
        axes.legend(loc="best", frameon=False)
    axes.set_yticks(range(len(rows)), [f"{rule}  (lr {row['lr']:.2g})" for rule, row in rows])
    axes.set_xlabel("validation loss, nats per byte (dots: seeds; bars: their mean)")
    axes.set_title(setting, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    path = RESULTS / "optimizer_quality.png"
    figure.savefig(path, dpi=150)
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES, metavar="RULE", help=", ".join(RULES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--model", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="of the preset's learning rate")
    parser.add_argument("--beyond", type=int, default=2, help="rates tried beyond an end of the grid that was best")
    parser.add_argument("--rank", type=int, help="of the low-rank rules: a quarter of the width otherwise")
    parser.add_argument("--refresh-every", type=int, help="of the low-rank rules: a quarter of the steps otherwise")
    parser.add_argument("--processes", type=int, help="runs side by side: 2, on a GPU 1")
    parser.add_argument("--gpu", action="store_true", help="the large setting")
    options = parser.parse_args()
    options.factors.sort()
    options.rank = options.rank or (128 if options.gpu else 32)
    options.refresh_every = options.refresh_every or max(1, options.steps // 4)
    options.processes = options.processes or (1 if options.gpu else 2)
    try:
        for rule in options.rules:
            digest_of(overrides_of((rule, preset(rule), SEEDS[0]), options))
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse()
    kept = Kept(RESULTS / "optimizer_quality.jsonl")
    make_runs(lambda: all_needed(kept, options), kept, options.processes, options.gpu)
    found = summarise(kept, options)
    print_table(found)
    setting = {
        key: getattr(options, key) for key in ("steps", "model", "factors", "beyond", "rank", "refresh_every", "gpu")
    }
    setting |= {"overrides": [*ALWAYS, *(GPU if options.gpu else CPU)], "seeds": SEEDS}
    path = write_record("optimizer_quality", {"setting": setting, "rules": found})
    tokens = next(iter(found.values()))["tokens"]
    name = "llama_60m" if options.gpu else "2 layers, dim 128"
    picture = draw(
        found, f"{', '.join([name, *options.model])}: {tokens / 1e6:.1f} million bytes of the standard library"
    )
    print(f"\nwritten: {path}, {picture or 'no picture, matplotlib is not installed'}")


if __name__ == "__main__":
    main()
