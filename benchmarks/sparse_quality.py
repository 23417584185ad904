r"""Validation loss of every sparse method at densities 0.5, 0.2 and 0.1: after the same tokens, and after the same
floating-point operations.

    python benchmarks/sparse_quality.py                          on 2 cores about an hour; interrupt it and go on later
    python benchmarks/sparse_quality.py --methods none static set rigl srigl --densities 0.1 --equal tokens --steps 5000 \
        --name sparse_quality_long

Every run is the product's own: `trainer.prepare`, then `trainer.train`, on the `stdlib` corpus, byte by byte, with the
settings of conf/sparsity but for the density and the time between updates (a share of the run). `none` is dense. 2:4, which
is `nm` and `pdp_nm`, has the density 0.5 alone. `flops`: operations in training are those that the method's formulas leave
where zeros cost nothing (`optim.sparse.account`), not those that this machine makes; a sparse run gets as many more steps
as bring it to the dense run's. A seed is that of the initial weights, the masks and the order of the data, so methods are
compared with `static` seed by seed. All runs end with the whole held-out text.

Finished runs are kept in results/sparse_quality.jsonl with a digest of their settings and of the code that made them;
what is there with the same digest is not run again. The picture needs matplotlib (`pip install rowwise[bench]`).
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from quality_runs import Kept, make_runs
from record import RESULTS, write_record

from rowwise.launch.compose import compose_tree
from rowwise.optim.sparse.account import weights_multiplied
from rowwise.optim.sparse.budget import gradual_density
from rowwise.optim.sparse.config import NM, GradualBase, NoSparsity, PDPBase, PDPGroups, sparse_layers
from rowwise.trainer.config import TrainConfig, config_from_tree
from rowwise.trainer.models.decoder import flops_per_token, parameter_specs

METHODS = ("none", "static", "set", "rigl", "srigl", "nm", "pdp_nm", "pdp_rows", "st3", "pdp", "gradual")
OF_GROUPS = ("nm", "pdp_nm")  # 2:4 has a density of its own
EVOLVING = ("set", "rigl", "srigl")
DENSITIES = (0.5, 0.2, 0.1)
SEEDS = (0, 1, 2)
EQUAL = ("tokens", "flops")
ALWAYS = [
    "data=stdlib", "checkpoint.every=0", "sample.tokens=0", "eval.batches=1000000", "resume=never",
    "model=tiny", "model.layers=2", "model.dim=64", "model.ffn_dim=176",
    "batch.seq_len=128", "batch.global_size=8", "batch.micro_size=8",
]  # fmt: skip
Run = tuple[str, float, str, int]  # method, density, what is equal, seed


def overrides_of(run: Run, options: argparse.Namespace) -> tuple[str, ...]:
    """The command line of a run, but for its folder."""
    method, density, equal, seed = run
    own = [*ALWAYS, f"sparsity={method}", f"seed={seed}"]
    if method not in ("none", *OF_GROUPS):
        own.append(f"sparsity.density={density}")
    steps = options.steps
    if equal == "flops":
        steps = round(steps / training_share(config_from_tree(compose_tree([*own, f"steps={steps}"]))))
    if method in EVOLVING:
        own.append(f"sparsity.update_every={max(1, steps // options.updates)}")
    return (*own, f"steps={steps}", f"eval.every={steps}", *options.settings)


def training_share(config: TrainConfig) -> float:
    """Floating-point operations of a run over those of the dense one."""
    choice, specs = config.sparsity, parameter_specs(config.model)
    if isinstance(choice, NoSparsity):
        return 1.0
    sizes = [specs[name].shape.numel() for name in sparse_layers(choice, specs)]
    dense, total = flops_per_token(config.model, config.batch.seq_len), 0.0
    for step in range(1, config.steps + 1):
        density = choice.n / choice.m if isinstance(choice, NM | PDPGroups) else choice.density
        if isinstance(choice, GradualBase):
            density = gradual_density(step, density, choice.first_step(config.steps), choice.last_step(config.steps))
        elif isinstance(choice, PDPBase) and step < choice.first_step(config.steps):
            density = 1.0  # and while masks are soft everything is multiplied
        forward, backward = weights_multiplied(choice, [round(density * sum(sizes))], sizes, step, config.steps)
        total += dense - 2 * (3 * sum(sizes) - forward - backward)
    return total / dense / config.steps


def needed(options: argparse.Namespace) -> list[Run]:
    """Every run: first those of the same tokens, all methods with one seed, then with the next."""
    runs = []
    for equal, seed in itertools.product(options.equal, SEEDS[: options.seeds]):
        for method in options.methods:
            if method == "none" and equal == "flops" and "tokens" in options.equal:
                continue  # the same run
            for density in (1.0,) if method == "none" else (0.5,) if method in OF_GROUPS else options.densities:
                runs.append((method, density, equal, seed))
    return runs


def missing(kept: Kept, options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """What is not there yet."""
    runs = {str(run): overrides_of(run, options) for run in needed(options)}
    return {name: overrides for name, overrides in runs.items() if kept.get(overrides) is None}


def summarise(kept: Kept, options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """what is equal -> density -> method -> losses by seed, their mean and spread, also less those of `static`."""
    found: dict[str, dict[str, dict[str, Any]]] = {equal: {} for equal in options.equal}
    answers = {run: kept.get(overrides_of(run, options)) for run in needed(options)}
    for (method, density, equal, _seed), answer in answers.items():
        assert answer is not None
        for where in options.equal if method == "none" else (equal,):
            row = found[where].setdefault(str(density), {}).setdefault(method, {"losses": [], "seconds": []})
            row["losses"].append(answer["eval_loss"])
            row["seconds"].append(answer["seconds"])
            row["tokens"] = answer["tokens"]
    for at in [at for part in found.values() for at in part.values()]:
        for row in at.values():
            row |= mean_and_spread(row["losses"])
            row["seconds"] = statistics.median(row["seconds"])
            if "static" in at:
                less = [a - b for a, b in zip(row["losses"], at["static"]["losses"], strict=True)]
                row["minus_static"] = mean_and_spread(less)
    return found


def mean_and_spread(numbers: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.mean(numbers),
        "standard_deviation": statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
    }


def print_table(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    for equal, part in found.items():
        print(f"\nsame {equal}\n\n| density | method | validation loss | minus static, seed by seed | million tokens |")
        print("|---|---|---|---|---|")
        for density, at in sorted(part.items(), key=lambda item: -float(item[0])):
            for method, row in sorted(at.items(), key=lambda item: item[1]["mean"]):
                less = row.get("minus_static")
                beside = f"{less['mean']:+.4f} ± {less['standard_deviation']:.4f}" if less else ""
                print(f"| {density} | {method} | {row['mean']:.4f} ± {row['standard_deviation']:.4f} | {beside} "
                      f"| {row['tokens'] / 1e6:.2f} |")  # fmt: skip


def draw(found: dict[str, dict[str, dict[str, Any]]], name: str) -> Path | None:
    """A panel for each kind of equality: the loss over the density, a line a method. None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4.6), layout="constrained", sharey=True,
                                  squeeze=False)  # fmt: skip
    for axes, (equal, part) in zip(panels[0], found.items(), strict=True):
        for i, method in enumerate(m for m in METHODS if m != "none"):
            points = sorted((float(d), at[method]) for d, at in part.items() if method in at)
            if points:
                axes.errorbar([d for d, _ in points], [row["mean"] for _, row in points],
                              [row["standard_deviation"] for _, row in points], marker="o", capsize=3, label=method,
                              color=f"C{i}")  # fmt: skip
        if "1.0" in part:
            axes.axhline(part["1.0"]["none"]["mean"], color="gray", linestyle="--", linewidth=0.8, label="dense")
        axes.set_xscale("log")
        axes.set_xticks(DENSITIES, [str(d) for d in DENSITIES])
        axes.minorticks_off()
        axes.set_xlabel("density of the hidden matrices")
        axes.set_title(f"same {equal} as the dense run", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation loss, nats per byte (mean and spread of seeds)")
    panels[0][-1].legend(frameon=False, fontsize=8)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=150)
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--equal", nargs="+", default=EQUAL, choices=EQUAL)
    parser.add_argument("--steps", type=int, default=1000, help="of the dense run")
    parser.add_argument("--updates", type=int, default=10, help="times masks could change in a run")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", default="sparse_quality", help="of the results file")
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    return parser.parse_args()


def main() -> None:
    options = parse()
    kept = Kept(RESULTS / "sparse_quality.jsonl")
    make_runs(lambda: missing(kept, options), kept, options.processes)
    found = summarise(kept, options)
    print_table(found)
    setting = {key: getattr(options, key) for key in ("steps", "updates", "seeds", "settings")} | {"overrides": ALWAYS}
    path = write_record(options.name, {"setting": setting, "equal": found})
    print(f"\nwritten: {path}, {draw(found, options.name) or 'no picture, matplotlib is not installed'}")


if __name__ == "__main__":
    main()
