"""Parameters -> roles -> rules -> optimizer; and the table that says where every parameter went."""

import re
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import ParameterSpec, Specs, learning, specs_of
from rowwise.optim.adafactor import AdafactorConfig
from rowwise.optim.adamw import AdamWConfig
from rowwise.optim.home import Home
from rowwise.optim.lion import LionConfig
from rowwise.optim.lion_kappa import LionKappa
from rowwise.optim.lowrank.config import (
    ApolloConfig,
    ApolloMiniConfig,
    DCTConfig,
    FiraConfig,
    GaLoreConfig,
    LowRankBase,
)
from rowwise.optim.lowrank.rules import DCT, Apollo, ApolloMini, Fira, GaLore, LowRank
from rowwise.optim.lr_schedules import OneCycle, ScheduleConfig
from rowwise.optim.muon import MuonConfig
from rowwise.optim.optimizer import Optimizer
from rowwise.optim.quantized import AdamW8bitConfig, Lion8bitConfig, is_quantisable
from rowwise.optim.rule import Rule

OptimConfig = (
    AdamWConfig | LionConfig | AdafactorConfig | MuonConfig | AdamW8bitConfig | Lion8bitConfig
    | GaLoreConfig | DCTConfig | FiraConfig | ApolloConfig | ApolloMiniConfig
)  # fmt: skip

LOW_RANK = {"galore": GaLore, "dct": DCT, "fira": Fira, "apollo": Apollo, "apollo_mini": ApolloMini}
CYCLED = ("adamw", "adamw8bit", "lion", "lion8bit", *LOW_RANK)  # all that they consist of has a beta1
ELEMENTWISE = ("adamw", "adamw8bit", "lion", "lion8bit")  # and so are all that they fall back on
# Rules that parameters of others may follow.
LENT = {"adamw": AdamWConfig, "adamw8bit": AdamW8bitConfig, "lion": LionConfig, "lion8bit": Lion8bitConfig}
FROZEN = "frozen"  # what optim.assign can name in the place of a rule
LION_KAPPA = "lion_kappa"  # of hidden matrices, where optim.kappa is not l1
MATRICES_ONLY = {"adamw8bit", "lion8bit"}  # of what optim.assign can name
# What `own` means: rule -> role -> rule; a role that is not named has the rule itself.
HIDDEN_ONLY = {"embedding": "adamw", "head": "adamw", "adapter": "adamw", "vector": "adamw"}
FALLBACKS = {
    "adamw8bit": {"embedding": "adamw", "vector": "adamw"},
    "lion8bit": {"embedding": "lion", "vector": "lion"},
} | dict.fromkeys(("muon", *LOW_RANK), HIDDEN_ONLY)


def assigned(name: str, config: OptimConfig) -> str:
    """Says what the first pattern of `optim.assign` that matches says of a parameter; `own` where none does."""
    return next((a.rule for a in config.assign if fnmatchcase(name, a.match)), "own")


def frozen_by(specs: Specs, config: OptimConfig) -> Specs:
    """Returns the specs of a run in which what `optim.assign` freezes does not learn."""
    if not any(assign.rule == FROZEN for assign in config.assign):
        return specs
    return {n: replace(spec, frozen=True) if assigned(n, config) == FROZEN else spec for n, spec in specs.items()}


def rule_name(name: str, spec: ParameterSpec, config: OptimConfig) -> str:
    """Returns the rule of a parameter: the first pattern of `optim.assign` that matches, else the rule's own table. An 8-bit
    rule keeps a matrix that is too small for 8 bits in 32. What is frozen follows none."""
    if spec.frozen:
        return FROZEN
    own = FALLBACKS.get(config.name, {}).get(spec.role, config.name)
    if isinstance(config, LionConfig) and config.kappa != "l1" and spec.role == "hidden":
        own = LION_KAPPA
    chosen = assigned(name, config)
    # What a pattern asks for by name goes past the table: 8 bits for an embedding, say.
    found = own if chosen == "own" else chosen
    return found.removesuffix("8bit") if found.endswith("8bit") and not is_quantisable(spec.matrix) else found


def rank_of(config: OptimConfig, specs: Specs) -> int:
    """Returns the rank of low-rank rules: what `config` says, else a quarter of the model's width, which is the widest narrow side
    of its hidden matrices that learn, so that every stage of a pipeline finds the same."""
    if not isinstance(config, LowRankBase):
        return 1
    sides = [min(spec.matrix) for spec in learning(specs).values() if spec.role == "hidden"]
    return config.rank or max(1, max(sides, default=1) // 4)


def new_rule(name: str, config: Any, rank: int = 1) -> Rule:
    """Makes the rule `name` with the numbers of `config`: its own, or one that it lends some of its parameters to, which has its
    betas and eps, or AdamW's. `rank` is that of low-rank rules."""
    if name in LOW_RANK:
        return LOW_RANK[name](config, rank, getattr(config, "state_bits", 32))
    if name == config.name:
        return config.new_rule()
    numbers = {key: getattr(config, key, getattr(AdamWConfig(), key)) for key in ("betas", "eps")}
    if name == LION_KAPPA:
        return LionKappa(config.kappa, numbers["betas"], config.delta or 1.0)
    lent: Any = LENT[name]
    return lent(**{field.name: numbers[field.name] for field in fields(lent) if field.name in numbers}).new_rule()


def build_optimizer(model: nn.Module, config: OptimConfig, seed: int = 0, home: Home | None = None) -> Optimizer:
    """Makes the optimizer of `config` over the model's (sharded) parameters that learn. Matrices decay, vectors do not; `seed` is that
    of random projections and of stochastic rounding; `home`: where its states wait, if not on the device. Raises ValueError for a
    parameter that the model's specs lack."""
    groups: dict[tuple[str, bool, int, bool, str, float], dict[str, Any]] = {}
    specs = specs_of(model)
    rank = rank_of(config, specs)
    for name, p in model.named_parameters():
        if name not in specs:
            raise ValueError(f"{name} is not among the model's parameter_specs(); say there what it is")
        spec = specs[name]
        if spec.frozen:
            continue
        # What is in one group exchanges its messages together, over the ranks that one view splits rows over.
        key = rule_name(name, spec, config), spec.role == "vector", len(spec.matrix), spec.batched, spec.view, spec.rate
        if key not in groups:
            groups[key] = _new_group(spec, new_rule(key[0], config, rank), config)
        groups[key]["params"].append(p)
        groups[key]["names"].append(name)
    if not groups:  # a stage of a pipeline that is frozen
        spec = ParameterSpec(torch.Size(), "vector")
        return Optimizer([_new_group(spec, new_rule(config.name, config, rank), config)], config.lr, seed, home)
    return Optimizer(list(groups.values()), config.lr, seed, home)


def _new_group(spec: ParameterSpec, rule: Rule, config: OptimConfig) -> dict[str, Any]:
    """A group of parameters like one of this spec, none yet."""
    decay = 0.0 if spec.role == "vector" else config.weight_decay
    said = {"batched": spec.batched, "view": spec.view, "rate": spec.rate, "weight_decay": decay}
    return {"params": [], "names": [], "rule": rule, **said}


MOMENTUM_CYCLE: Refusals = (
    Refusal(
        ("schedule.momentum", "optim.name"),
        lambda run: (
            isinstance(run.schedule, OneCycle) and run.schedule.momentum is not None and run.optim.name not in CYCLED
        ),
        "schedule.momentum={schedule.momentum} with optim={optim.name}: its matrices have no beta1 to cycle; possible are "
        f"{', '.join(CYCLED)}, or schedule.momentum=null",
    ),
)
STEP_BACK: Refusals = (
    Refusal(
        ("parallel.post_validation", "optim.name", "optim.kappa"),
        lambda run: run.parallel.post_validation and not is_elementwise(run.optim),
        lambda run: (
            f"parallel.post_validation with optim={run.optim.name}"
            f"{f' optim.kappa={run.optim.kappa}' if isinstance(run.optim, LionConfig) else ''}: its step exchanges messages or "
            f"draws on a basis that one rank cannot take back alone; possible are {', '.join(ELEMENTWISE)} (lion with "
            "optim.kappa=l1, rows or huber), or parallel.post_validation=false"
        ),
    ),
)


def is_elementwise(config: OptimConfig) -> bool:
    """Says whether every parameter changes by its own numbers alone, so that one rank can take a step back."""
    kappa = config.kappa if isinstance(config, LionConfig) else "l1"
    return config.name in ELEMENTWISE and kappa in ("l1", "rows", "huber")


def check_optimizer(config: OptimConfig, specs: Specs) -> None:
    """Refuses numbers that no optimizer can use, and what the parameters do not admit. Raises ValueError."""
    config.check()
    for i, assign in enumerate(config.assign):
        left = [n for n in specs if not any(fnmatchcase(n, earlier.match) for earlier in config.assign[:i])]
        found = [name for name in left if fnmatchcase(name, assign.match)]
        if not found:
            raise ValueError(
                f"optim.assign: no parameter matches {assign.match!r}"
                f"{' that no earlier pattern takes' if i else ''}; there are {', '.join(sorted(fold(left)))}"
            )
        if assign.rule in LENT and all(specs[name].frozen for name in found):
            raise ValueError(
                f"optim.assign: what {assign.match!r} matches is frozen already, by an adapter or before it, and follows no rule such "
                f"as {assign.rule}; there learn {', '.join(sorted(fold(learning(specs))))}"
            )
    learns = learning(specs)
    if not learns:
        raise ValueError("optim.assign: every parameter is frozen; leave some to learn")
    if FALLBACKS.get(config.name) is HIDDEN_ONLY and not any(spec.role == "hidden" for spec in learns.values()):
        raise ValueError(
            f"optim={config.name} is a rule of hidden matrices, and an adapter or optim.assign freezes all of them; possible are "
            f"{', '.join(ELEMENTWISE)}, adafactor"
        )
    for name, spec in learns.items():
        _check_parameter(name, spec, config)


def _check_parameter(name: str, spec: ParameterSpec, config: OptimConfig) -> None:
    chosen, shape = assigned(name, config), spec.matrix
    if spec.role != "vector" and len(shape) != 2:
        raise ValueError(
            f"{name} is said to be {spec.role}, which is a matrix, and has the shape {tuple(shape)}; say in its spec that it is a "
            "vector, or batched"
        )
    if chosen in MATRICES_ONLY and len(shape) != 2:
        raise ValueError(
            f"optim.assign: {chosen} is for matrices, and {name} has the shape {tuple(shape)}; "
            "give a pattern that matches matrices only, or rule: adamw"
        )
    rank = config.rank if isinstance(config, LowRankBase) and rule_name(name, spec, config) == config.name else None
    if rank is not None and rank > min(shape):
        raise ValueError(
            f"optim.rank={rank} is above the narrow side of {name}, {tuple(shape)}; give at most {min(shape)}, "
            "null for a quarter of the model's width, or another rule to this matrix with optim.assign"
        )


Assignments = dict[tuple[str, ...], list[int]]


def assignments(model: nn.Module, optimizer: Optimizer) -> Assignments:
    """Returns (parameter, shape, role, rule, dtypes of its state) -> (how many, their numbers, bytes of their states over all
    ranks). Layers that are alike are one entry."""
    names = {p: name for name, p in model.named_parameters()}
    specs = specs_of(model)
    rows: Assignments = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            dtypes = " ".join(dict.fromkeys(_short(t.dtype) for t in state.values()))
            shape = " x ".join(map(str, p.shape))
            spec = specs[names[p]]
            row = (_folded(names[p]), shape, spec.role, _described(group["rule"], spec.matrix), dtypes)
            counts = rows.setdefault(row, [0, 0, 0])
            counts[0] += 1
            counts[1] += p.numel()
            counts[2] += sum(t.numel() * t.itemsize for t in state.values())
    return rows


def _described(rule: Rule, shape: torch.Size) -> str:
    return f"{rule.name}, rank {rule.rank_of(shape)}" if isinstance(rule, LowRank) else rule.name


def joined(parts: list[Assignments]) -> Assignments:
    """Returns the assignments of all the parts of a model, such as the stages of a pipeline, as those of one."""
    rows: Assignments = {}
    for part in parts:
        for row, counts in part.items():
            rows[row] = [a + b for a, b in zip(rows.get(row, [0, 0, 0]), counts, strict=True)]
    return rows


def state_bytes(rows: Assignments) -> int:
    """Returns what the optimizer keeps, over all ranks that split it."""
    return sum(kept for _, _, kept in rows.values())


def assignment_table(rows: Assignments) -> str:
    """Says which rule every parameter follows, a line for all that are alike, and the bytes of its state."""
    head = ("parameter", "shape", "kind", "rule", "state", "count", "bytes/parameter")
    lines = [head] + [(*row, str(c), f"{b / n:.2f}") for row, (c, n, b) in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    total = state_bytes(rows) / sum(n for _, n, _ in rows.values())
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, f"optimizer state: {total:.2f} bytes per parameter"])


def fold(names: Any) -> list[str]:
    """Names with the number of a layer replaced by *, each once."""
    return list(dict.fromkeys(_folded(name) for name in names))


def _folded(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "uint8", torch.int32: "int32"}[dtype]


def follow_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, schedule: ScheduleConfig, step: int, steps: int
) -> float:
    """Sets what `schedule` says of `step`, counted from 0: the learning rate, which is returned, in every group as the multiple
    that it has of it, and under a momentum cycle the beta1 of every rule."""
    lr = config.lr * schedule.factor(step, steps)
    beta1 = schedule.beta1(step, steps) if isinstance(schedule, OneCycle) else None
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        if beta1 is not None:
            group["rule"].beta1 = beta1
    return lr


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Returns parameter name -> state name -> tensor: tensors only, laid so that any layout can read what any other wrote."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets how many updates have been made: a resumed optimizer goes on counting."""
    for group in optimizer.param_groups:
        group["step"] = step
