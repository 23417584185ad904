"""Bytes of optimizer state per parameter: counted on the states' storages, beside the formula of each rule.

    python benchmarks/optimizer_bytes.py                        llama_130m and llama_1b, at the ranks of the GaLore paper
    python benchmarks/optimizer_bytes.py --models tiny --rank 32

Optimizers are built on the meta device, where storages have their true sizes and take no memory. That a step leaves the
bytes that were there before it is seen on the CPU, on one small layer. The exit code is 1 where it does not, where a
count differs from its formula, or where one is above its bound in BOUNDS.

In formulas m and n are the rows and columns of a matrix, r is the rank, and the bytes are those of the whole matrix.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any, get_args

import torch
from record import write_record
from torch import Tensor, nn

from rowwise.kernels.spec import specs_of
from rowwise.launch.compose import compose_tree
from rowwise.optim.build import LOW_RANK, OptimConfig, build_optimizer, rule_name
from rowwise.trainer.config import config_from_tree
from rowwise.trainer.models.decoder import Decoder, ModelConfig, parameter_specs

RULES = [choice.name for choice in get_args(OptimConfig)]
RANKS = {"llama_60m": 128, "llama_130m": 256, "llama_350m": 256, "llama_1b": 512}  # Zhao et al., *GaLore*, table 2
# Beside the rules as they are: low-rank moments in 8 bits, and 8 bits for the embedding too, as others have it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{rule}, 8-bit moments": (rule, {"state_bits": 8}) for rule in LOW_RANK if rule != "apollo_mini"},
    "adamw8bit, embedding too": ("adamw8bit", {"assign": [{"match": "embed.weight", "rule": "adamw8bit"}]}),
}
BOUNDS = {"adamw": 8.0, "adamw8bit": 2.04, "lion": 4.0, "lion8bit": 1.02, "muon": 4.0}  # hidden matrices, a parameter
FORMULAS = {
    "adamw": "8 m n",
    "adamw8bit": "2 m (n + 4 ceil(n / 256))",
    "lion": "4 m n",
    "lion8bit": "m (n + 4 ceil(n / 256))",
    "adafactor": "4 (m + n)",
    "muon": "4 m n",
    "galore": "8 m r + 4 n r",
    "dct": "8 m r + 4 r",
    "fira": "8 m r + 4 n r + 4",
    "apollo": "8 m r + 4",
    "apollo_mini": "8 m + 4",
}
EIGHT_BITS = "2 m (r + 4 ceil(r / 256))"  # stands for 8 m r where moments are in 8 bits


def optim_config(name: str, rank: int, **changes: Any) -> OptimConfig:
    """The configuration that `optim=name` gives, or that of a variant, with this rank where it has one."""
    rule, varied = VARIANTS.get(name, (name, {}))
    tree = compose_tree([f"optim={rule}"])
    tree["optim"] |= varied | changes | ({"rank": rank} if "rank" in tree["optim"] else {})
    return config_from_tree(tree).optim


def model_config(model: str, *overrides: str) -> ModelConfig:
    return config_from_tree(compose_tree([f"model={model}", *overrides])).model


def rank_of(config: ModelConfig) -> int:
    """The paper's; for other models a quarter of the width, if every matrix has it."""
    narrow = min(min(spec.matrix) for spec in parameter_specs(config).values() if spec.role != "vector")
    return RANKS.get(config.name, min(config.dim // 4, narrow))


def formula(name: str) -> str:
    """Bytes of a hidden matrix, in words."""
    rule, varied = VARIANTS.get(name, (name, {}))
    return FORMULAS[rule].replace("8 m r", EIGHT_BITS) if "state_bits" in varied else FORMULAS[rule]


def formula_bytes(rule: str, shape: torch.Size, rank: int, bits: int) -> int:
    """Bytes of the state of one parameter under the rule that it really follows."""
    if len(shape) == 1:
        return shape[0] * {"lion": 4, "adafactor": 4, "adamw": 8}[rule]
    m, n = shape
    low = 8 * m * rank if bits == 32 else 2 * m * (rank + 4 * -(-rank // 256))
    return {
        "adamw": 8 * m * n,
        "adamw8bit": 2 * m * (n + 4 * -(-n // 256)),
        "lion": 4 * m * n,
        "lion8bit": m * (n + 4 * -(-n // 256)),
        "adafactor": 4 * (m + n),
        "muon": 4 * m * n,
        "galore": low + 4 * n * rank,
        "dct": low + 4 * rank,
        "fira": low + 4 * n * rank + 4,
        "apollo": low + 4,
        "apollo_mini": 8 * m + 4,
    }[rule]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each once. Tensors on the meta device share none."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def count_rule(name: str, model: nn.Module, rank: int) -> dict[str, Any]:
    """Bytes per parameter of one rule, in hidden matrices and in all: counted, and by the formula."""
    config = optim_config(name, rank)
    optimizer = build_optimizer(model, config)
    specs = specs_of(model)
    sums = {"hidden": [0, 0, 0], "all": [0, 0, 0]}
    for key, p in model.named_parameters():
        rule = rule_name(key, specs[key], config)
        expected = formula_bytes(rule, p.shape, rank, getattr(config, "state_bits", 32))
        row = (p.numel(), storage_bytes(optimizer.state[p].values()), expected)
        for where in ("hidden", "all") if specs[key].role == "hidden" else ("all",):
            sums[where] = [a + b for a, b in zip(sums[where], row, strict=True)]
    found = {
        where: {"counted": bytes_ / numel, "formula": expected / numel, "bytes": bytes_, "parameters": numel}
        for where, (numel, bytes_, expected) in sums.items()
    }
    agree = all(bytes_ == expected for _, bytes_, expected in sums.values())
    return {"formula": formula(name), "passed": agree and found["hidden"]["counted"] <= bound(name), **found}


def bound(name: str) -> float:
    return BOUNDS.get(name, float("inf"))


def count_model(model: str, rank: int | None = None) -> dict[str, Any]:
    """Every rule and variant on one model."""
    config = model_config(model)
    with torch.device("meta"):
        decoder = Decoder(config)
    rank = rank or rank_of(config)
    return {"rank": rank, "rules": {name: count_rule(name, decoder, rank) for name in [*RULES, *VARIANTS]}}


def unchanged_by_steps(name: str) -> bool:
    """Whether two steps on one small layer on the CPU leave the state's bytes as they were, and change it."""
    model = Decoder(model_config("tiny", "model.layers=1"))
    optimizer = build_optimizer(model, optim_config(name, 32))
    tensors = [t for p in model.parameters() for t in optimizer.state[p].values()]
    before, start = storage_bytes(tensors), [t.clone() for t in tensors]
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    now = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return storage_bytes(now) == before and any(not torch.equal(a, b) for a, b in zip(start, now, strict=True))


def measure_bytes(models: list[str], rank: int | None = None) -> dict[str, Any]:
    """What the record holds."""
    stepped = {name: unchanged_by_steps(name) for name in [*RULES, *VARIANTS]}
    return {"models": {model: count_model(model, rank) for model in models}, "unchanged_by_steps": stepped}


def passed(found: dict[str, Any]) -> bool:
    counts = [row["passed"] for model in found["models"].values() for row in model["rules"].values()]
    return all([*counts, *found["unchanged_by_steps"].values()])


def print_table(model: str, found: dict[str, Any]) -> None:
    print(f"\n{model}, rank {found['rank']}; bytes of state per parameter\n")
    print("| rule | hidden matrices | by formula | bytes of a hidden matrix | whole model | by formula | GB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found["rules"].items():
        hidden, whole = row["hidden"], row["all"]
        print(f"| {name} | {hidden['counted']:.4f} | {hidden['formula']:.4f} | {row['formula']} | {whole['counted']:.3f} "
              f"| {whole['formula']:.3f} | {whole['bytes'] / 1e9:.3f} |{'' if row['passed'] else ' FAILED'}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_130m", "llama_1b"])
    parser.add_argument("--rank", type=int, help="for all models; the paper's otherwise")
    options = parser.parse_args()
    found = measure_bytes(options.models, options.rank)
    for model, counted in found["models"].items():
        print_table(model, counted)
    if changed := [name for name, same in found["unchanged_by_steps"].items() if not same]:
        print(f"\nFAILED: steps changed the size of the state, or left it as it was: {', '.join(changed)}")
    print(f"\nwritten: {write_record('optimizer_bytes', found)}")
    return 0 if passed(found) else 1


if __name__ == "__main__":
    sys.exit(main())
