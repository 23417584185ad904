"""The choices of `sparsity`: which matrices are sparse, how much of them is kept, and by which rule it changes."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch

from rowwise.optim.build import fold, kind_of
from rowwise.optim.sparse.budget import budgets


@dataclass(frozen=True, kw_only=True)
class NoSparsity:
    """Every matrix is dense."""

    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class SparseBase:
    """`layers`: shell patterns of parameter names; the hidden matrices that match one are sparse."""

    layers: list[str] = field(default_factory=lambda: ["*"])


@dataclass(frozen=True, kw_only=True)
class TimedBase(SparseBase):
    """Masks change every `update_every` steps from `start_at` to `stop_at` (null: 0.75 of the steps)."""

    update_every: int = 100
    start_at: int = 0
    stop_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetBase(SparseBase):
    """`density`: the share of all their weights that is kept; `distribution`: how it is spread over matrices."""

    density: float = 0.2
    distribution: Literal["uniform", "er", "erk"] = "erk"


@dataclass(frozen=True, kw_only=True)
class Static(BudgetBase):
    """A random mask that stays as it is: what every other method must beat."""

    name: Literal["static"] = "static"


@dataclass(frozen=True, kw_only=True)
class EvolvingBase(BudgetBase, TimedBase):
    """Before `start_at` the model is dense; 0: it starts from a random mask. `replace`: the share of a mask that an update
    at step 0 would replace; later ones replace less, along a cosine to `stop_at`."""

    replace: float = 0.3


@dataclass(frozen=True, kw_only=True)
class SET(EvolvingBase):
    """`redistribute`: see `optim.sparse.evolve`. `growth`: `unfired` prefers weights that no mask has had yet."""

    name: Literal["set"] = "set"
    redistribute: bool = False
    growth: Literal["random", "unfired"] = "random"


@dataclass(frozen=True, kw_only=True)
class RigL(EvolvingBase):
    name: Literal["rigl"] = "rigl"
    redistribute: bool = False


@dataclass(frozen=True, kw_only=True)
class SRigL(EvolvingBase):
    """`ablate_below`: a neuron with fewer salient weights than this share of the fan-in is left out; 0: none ever is. As
    its authors have it for transformers; for convolutions they have 0.3 and erk."""

    name: Literal["srigl"] = "srigl"
    distribution: Literal["uniform", "er", "erk"] = "uniform"
    ablate_below: float = 0.95


@dataclass(frozen=True, kw_only=True)
class CooledBase(TimedBase):
    """Dense until `start_at`; then the density falls with a cube to `density` at `stop_at`. `distribution`: `global` lets
    all matrices compete."""

    density: float = 0.2
    distribution: Literal["global", "uniform", "er", "erk"] = "global"
    update_every: int = 1


@dataclass(frozen=True, kw_only=True)
class Gradual(CooledBase):
    name: Literal["gradual"] = "gradual"
    distribution: Literal["global", "uniform", "er", "erk"] = "uniform"
    update_every: int = 10


@dataclass(frozen=True, kw_only=True)
class ST3(CooledBase):
    """`rescale`: rows grow by what their masks leave out. `account_every`: steps between counts of what the mask does; it
    changes at every update."""

    name: Literal["st3"] = "st3"
    rescale: bool = True
    account_every: int = 100


@dataclass(frozen=True, kw_only=True)
class PDP(CooledBase):
    """`temperature`: of the soft mask, in units of squared weights."""

    name: Literal["pdp"] = "pdp"
    temperature: float = 1e-4
    account_every: int = 100


@dataclass(frozen=True, kw_only=True)
class NM(SparseBase):
    """`n` of `m` neighbours along the row. `backward`: `column` prunes along the column for the input gradient (BDWP),
    `row` is SR-STE. `decay`: pulls what is pruned towards zero. `semi_structured`: multiply by the hardware's 2:4 form,
    where it is measured to be faster."""

    name: Literal["nm"] = "nm"
    n: int = 2
    m: int = 4
    backward: Literal["column", "row"] = "column"
    decay: float = 2e-4
    semi_structured: bool = False
    account_every: int = 100


SparsityConfig = NoSparsity | Static | SET | RigL | SRigL | Gradual | ST3 | PDP | NM
Budgeted = Static | SET | RigL | SRigL | Gradual | ST3 | PDP


def sparse_layers(config: SparsityConfig, shapes: dict[str, torch.Size]) -> list[str]:
    """The names of the sparse matrices, in the order of the model."""
    if isinstance(config, NoSparsity):
        return []
    hidden = [name for name, shape in shapes.items() if kind_of(name, shape) == "hidden"]
    return [name for name in hidden if any(fnmatchcase(name, pattern) for pattern in config.layers)]


def starts_at_random(config: SparsityConfig) -> bool:
    """Whether the first mask is drawn before anything is learned."""
    return isinstance(config, Static) or (isinstance(config, EvolvingBase) and config.start_at == 0)


def stop_step(config: TimedBase, steps: int) -> int:
    """The step of the last change."""
    return max(1, round(0.75 * steps)) if config.stop_at is None else config.stop_at


def check_sparsity(config: SparsityConfig, shapes: dict[str, torch.Size], steps: int) -> None:
    """Refuses what cannot be. `shapes`: of every parameter. Raises ValueError."""
    if isinstance(config, NoSparsity):
        return
    hidden = [name for name, shape in shapes.items() if kind_of(name, shape) == "hidden"]
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in hidden):
            raise ValueError(
                f"sparsity.layers: no hidden matrix matches {pattern!r}; there are {', '.join(sorted(fold(hidden)))}"
            )
    if not config.layers:
        raise ValueError('sparsity.layers is empty; give patterns such as ["*"], or sparsity=none')
    matrices = {name: shapes[name] for name in sparse_layers(config, shapes)}
    if isinstance(config, NM):
        _check_groups(config, matrices)
    else:
        _check_budget(config, matrices)
    if isinstance(config, TimedBase):
        _check_times(config, steps)
    if isinstance(config, EvolvingBase) and not 0 < config.replace < 1:
        raise ValueError(f"sparsity.replace={config.replace}: a share of the mask, above 0 and below 1")
    if isinstance(config, SRigL) and not 0 <= config.ablate_below <= 1:
        raise ValueError(f"sparsity.ablate_below={config.ablate_below}: a share of the fan-in, from 0 to 1")
    if isinstance(config, PDP) and config.temperature <= 0:
        raise ValueError(f"sparsity.temperature={config.temperature}: it is above 0")
    if isinstance(config, ST3 | PDP | NM) and config.account_every < 1:
        raise ValueError(f"sparsity.account_every={config.account_every}: it is at least 1")


def _check_budget(config: Budgeted, matrices: dict[str, torch.Size]) -> None:
    if not 0 < config.density <= 1:
        raise ValueError(f"sparsity.density={config.density}: the share of weights that is kept, above 0 and at most 1")
    counts = budgets(list(matrices.values()), config.density, config.distribution)
    for (name, shape), kept in zip(matrices.items(), counts, strict=True):
        least = shape[0] if isinstance(config, SRigL) else 1
        if kept < least:
            what = f"less than one weight for each of its {shape[0]} rows" if least > 1 else "no weight"
            raise ValueError(
                f"sparsity.density={config.density} with distribution={config.distribution} leaves {name}, "
                f"{tuple(shape)}, {what}; give a larger density, or leave it out of sparsity.layers"
            )


def _check_times(config: TimedBase, steps: int) -> None:
    stop = stop_step(config, steps)
    if config.update_every < 1:
        raise ValueError(f"sparsity.update_every={config.update_every}: it is at least 1")
    if stop < 1:
        raise ValueError(f"sparsity.stop_at={stop}: the step of the last change, at least 1")
    if stop > steps:
        raise ValueError(f"sparsity.stop_at={stop} is beyond the run of {steps} steps; give at most steps={steps}")
    if not 0 <= config.start_at <= stop:
        raise ValueError(f"sparsity.start_at={config.start_at}: from 0 to sparsity.stop_at, which is {stop}")
    # start_at = stop_at asks for a pruning and nothing after it.
    if isinstance(config, EvolvingBase) and config.start_at + config.update_every >= stop > config.start_at:
        raise ValueError(
            f"sparsity.update_every={config.update_every}: no mask would ever change between start_at={config.start_at} and "
            f"stop_at={stop}; give at most {stop - config.start_at - 1}, a later stop_at, or sparsity=static"
        )


def _check_groups(config: NM, matrices: dict[str, torch.Size]) -> None:
    if not 1 <= config.n <= config.m:
        raise ValueError(f"sparsity.n={config.n} sparsity.m={config.m}: n of every m weights are kept, 1 <= n <= m")
    if config.decay < 0:
        raise ValueError(f"sparsity.decay={config.decay}: it is at least 0")
    if config.semi_structured and (config.n, config.m) != (2, 4):
        raise ValueError(f"sparsity.semi_structured with {config.n}:{config.m}: hardware knows 2:4 alone")
    for name, (rows, columns) in matrices.items():
        if columns % config.m:
            raise ValueError(
                f"sparsity.m={config.m} does not divide the {columns} columns of {name}; give another m, or leave it out "
                "of sparsity.layers"
            )
        if config.backward == "column" and rows % config.m:
            raise ValueError(
                f"sparsity.m={config.m} does not divide the {rows} rows of {name}, along which sparsity.backward=column "
                "prunes; give another m, sparsity.backward=row, or leave it out of sparsity.layers"
            )
