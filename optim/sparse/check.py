"""What a choice of `sparsity` cannot mean for the matrices and the steps of a run."""

from fnmatch import fnmatchcase

import torch

from rowwise.conf.refusal import Refusal, Refusals
from rowwise.kernels.spec import Specs
from rowwise.optim.build import fold
from rowwise.optim.sparse.budget import budgets, row_budgets
from rowwise.optim.sparse.config import (
    NM,
    ST3,
    Budgeted,
    EvolvingBase,
    NoSparsity,
    PDPBase,
    PDPGroups,
    PDPRows,
    SparsityConfig,
    SRigL,
    TimedBase,
    every,
    sparse_layers,
    starts_at_random,
)

MASKED: Refusals = (
    Refusal(
        ("sparsity.name", "optim.in_backward"),
        lambda run: run.sparsity.name != "none" and run.optim.in_backward,
        "optim.in_backward with sparsity={sparsity.name}: masks cut every gradient before the step; give "
        "optim.in_backward=false",
    ),
    Refusal(
        ("sparsity.name", "parallel.post_validation"),
        lambda run: run.sparsity.name != "none" and run.parallel.post_validation,
        "parallel.post_validation with sparsity={sparsity.name}: a change of masks is not undone; give "
        "parallel.post_validation=false",
    ),
    Refusal(
        ("sparsity.name", "sparsity.start_at", "model.init_from"),
        lambda run: run.model.init_from is not None and starts_at_random(run.sparsity, run.steps),
        "sparsity={sparsity.name} with model.init_from={model.init_from}: a random mask would throw away most of what it "
        "learned; give sparsity.start_at=1 or later, which keeps the largest weights, or gradual, st3, pdp, pdp_rows, "
        "pdp_nm or nm",
    ),
    Refusal(
        ("sparsity.semi_structured", "precision.name"),
        lambda run: (
            isinstance(run.sparsity, NM) and run.sparsity.semi_structured and run.precision.name not in ("bf16", "fp16")
        ),
        "sparsity.semi_structured with precision={precision.name}: the hardware multiplies 16-bit numbers; give "
        "precision=bf16 or fp16, or sparsity.semi_structured=false",
    ),
)


def check_sparsity(config: SparsityConfig, specs: Specs, steps: int | None) -> None:
    """Refuses what cannot be. `specs`: of every parameter; `steps`: of the run, where they are known. Raises ValueError."""
    if isinstance(config, NoSparsity):
        return
    hidden = [name for name, spec in specs.items() if spec.role == "hidden"]
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in hidden):
            raise ValueError(
                f"sparsity.layers: no hidden matrix matches {pattern!r}; there are {', '.join(sorted(fold(hidden)))}"
            )
    if not config.layers:
        raise ValueError('sparsity.layers is empty; give patterns such as ["*"], or sparsity=none')
    for name in sparse_layers(config, specs):
        if specs[name].frozen:
            raise ValueError(
                f"sparsity.layers: {name} is frozen by an adapter or optim.assign, and masks are of weights that learn; leave it out "
                "of sparsity.layers, or give sparsity=none"
            )
        if specs[name].batched:
            raise ValueError(
                f"sparsity.layers: {name}, {tuple(specs[name].shape)}, is a batch of matrices, and masks are of single "
                "ones; leave it out of sparsity.layers, or give sparsity=none"
            )
    matrices = {name: specs[name].shape for name in sparse_layers(config, specs)}
    if isinstance(config, NM | PDPGroups):
        _check_groups(config, matrices)
    elif isinstance(config, PDPRows):
        _check_rows(config, matrices)
    else:
        _check_budget(config, matrices)
    if isinstance(config, TimedBase) and steps is not None:
        _check_times(config, steps)
    if isinstance(config, EvolvingBase) and not 0 < config.replace < 1:
        raise ValueError(f"sparsity.replace={config.replace}: a share of the mask, above 0 and below 1")
    if isinstance(config, SRigL) and not 0 <= config.ablate_below <= 1:
        raise ValueError(f"sparsity.ablate_below={config.ablate_below}: a share of the fan-in, from 0 to 1")
    if isinstance(config, PDPBase) and config.temperature <= 0:
        raise ValueError(f"sparsity.temperature={config.temperature}: it is above 0")
    if isinstance(config, ST3 | PDPBase | NM) and config.account_every < 1:
        raise ValueError(f"sparsity.account_every={config.account_every}: it is at least 1")


def _check_budget(config: Budgeted, matrices: dict[str, torch.Size]) -> None:
    _check_density(config.density, "weights")
    counts = budgets(list(matrices.values()), config.density, config.distribution)
    for (name, shape), kept in zip(matrices.items(), counts, strict=True):
        least = shape[0] if isinstance(config, SRigL) else 1
        if kept < least:
            what = f"less than one weight for each of its {shape[0]} rows" if least > 1 else "no weight"
            raise ValueError(
                f"sparsity.density={config.density} with distribution={config.distribution} leaves {name}, "
                f"{tuple(shape)}, {what}; give a larger density, or leave it out of sparsity.layers"
            )


def _check_rows(config: PDPRows, matrices: dict[str, torch.Size]) -> None:
    _check_density(config.density, "rows")
    for (name, shape), kept in zip(matrices.items(), row_budgets(list(matrices.values()), config.density), strict=True):
        if kept == 0:
            raise ValueError(
                f"sparsity.density={config.density} leaves {name}, {tuple(shape)}, no row; give a larger density, or leave "
                "it out of sparsity.layers"
            )


def _check_density(density: float, of: str) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"sparsity.density={density}: the share of {of} that is kept, above 0 and at most 1")


def _check_times(config: TimedBase, steps: int) -> None:
    for key in ("start", "stop"):
        share, number = getattr(config, key), getattr(config, f"{key}_at")
        if share is not None and number is not None:
            raise ValueError(
                f"sparsity.{key}={share} sparsity.{key}_at={number}: a share of the run or a step; give one of them"
            )
        if share is not None and not 0 <= share <= 1:
            raise ValueError(
                f"sparsity.{key}={share}: a share of the run, from 0 to 1; for a step give sparsity.{key}_at"
            )
    first, last = config.first_step(steps), config.last_step(steps)
    gap = every(getattr(config, "update_every", 1), steps)
    if gap < 1:
        raise ValueError(f"sparsity.update_every={gap}: it is at least 1")
    if last < 1:
        raise ValueError(f"sparsity.stop_at={last}: the step of the last change, at least 1")
    if last > steps:
        raise ValueError(f"sparsity.stop_at={last} is beyond the run of {steps} steps; give at most steps={steps}")
    if not 0 <= first <= last:
        raise ValueError(
            f"sparsity: the first change is at step {first} ({_said(config, 'start')}) and the last at {last} "
            f"({_said(config, 'stop')}) of {steps}; give a start from 0 to the stop"
        )
    # Both at one step ask for a pruning and nothing after it.
    if isinstance(config, EvolvingBase) and first + gap >= last > first:
        raise ValueError(
            f"sparsity.update_every={gap}: no mask would ever change between step {first} and step {last}, the last "
            f"({_said(config, 'stop')}); give at most {last - first - 1}, a later stop, or sparsity=static"
        )


def _said(config: TimedBase, key: str) -> str:
    """How one of its times came to be."""
    if (number := getattr(config, f"{key}_at")) is not None:
        return f"{key}_at={number}"
    share = getattr(config, key)
    return f"{key}={getattr(config, key.upper()) if share is None else share} of the run"


def _check_groups(config: NM | PDPGroups, matrices: dict[str, torch.Size]) -> None:
    if not 1 <= config.n <= config.m:
        raise ValueError(f"sparsity.n={config.n} sparsity.m={config.m}: n of every m weights are kept, 1 <= n <= m")
    for name, (_, columns) in matrices.items():
        if columns % config.m:
            raise ValueError(
                f"sparsity.m={config.m} does not divide the {columns} columns of {name}; give another m, or leave it out "
                "of sparsity.layers"
            )
    if isinstance(config, PDPGroups):
        if config.n == config.m:
            raise ValueError(f"sparsity=pdp_nm with {config.n}:{config.m} keeps everything; give n below m")
        return
    if config.decay < 0:
        raise ValueError(f"sparsity.decay={config.decay}: it is at least 0")
    if config.semi_structured and (config.n, config.m) != (2, 4):
        raise ValueError(f"sparsity.semi_structured with {config.n}:{config.m}: hardware knows 2:4 alone")
    for name, (rows, _) in matrices.items():
        if config.backward == "column" and rows % config.m:
            raise ValueError(
                f"sparsity.m={config.m} does not divide the {rows} rows of {name}, along which sparsity.backward=column "
                "prunes; give another m, sparsity.backward=row, or leave it out of sparsity.layers"
            )
