"""The choices of `sparsity`: which matrices are sparse, how much of them is kept, and by which rule it changes."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from rowwise.conf.option import Fixed, FixedAsSteps, MayChange
from rowwise.kernels.spec import Specs
from rowwise.optim.curves import length


@dataclass(frozen=True, kw_only=True)
class NoSparsity:
    """Every matrix is dense."""

    name: Fixed[Literal["none"]] = "none"


@dataclass(frozen=True, kw_only=True)
class SparseBase:
    """`layers`: shell patterns of parameter names; the hidden matrices that match one are sparse."""

    layers: Fixed[list[str]] = field(default_factory=lambda: ["*"])


def every(value: int | float, steps: int) -> int:
    """Returns the steps between two updates, which are said as steps or as a share of the run."""
    return value if isinstance(value, int) else max(1, length(value, None, 0.0, steps))


@dataclass(frozen=True, kw_only=True)
class TimedBase(SparseBase):
    """Masks change from one step to another. `start`: the share of the run at which they begin to, dense or by their first
    mask until then; null: `start_at`, or what the method has. `start_at`: the step, in its place. `stop`: the share of the
    run at the last change; null: `stop_at`, or what the method has. `stop_at`: the step, in its place."""

    START: ClassVar[float] = 0.0
    STOP: ClassVar[float] = 0.75
    start: FixedAsSteps[float | None] = None
    start_at: FixedAsSteps[int | None] = None
    stop: FixedAsSteps[float | None] = None
    stop_at: FixedAsSteps[int | None] = None

    def first_step(self, steps: int) -> int:
        """Returns the step, of a run of `steps`, after which the first masks are found; 0: before the run."""
        return length(self.start, self.start_at, self.START, steps)

    def last_step(self, steps: int) -> int:
        """Returns the step of the last change."""
        return max(1, length(self.stop, None, self.STOP, steps)) if self.stop_at is None else self.stop_at


@dataclass(frozen=True, kw_only=True)
class BudgetBase(SparseBase):
    """`density`: the share of all their weights that is kept. `distribution`: how it is spread over matrices, evenly
    (`uniform`) or by their sizes (`er`, `erk`)."""

    density: Fixed[float] = 0.2
    distribution: Fixed[Literal["uniform", "er", "erk"]] = "erk"


@dataclass(frozen=True, kw_only=True)
class Static(BudgetBase):
    """A random mask that stays as it is: what every other method must beat."""

    name: Fixed[Literal["static"]] = "static"


@dataclass(frozen=True, kw_only=True)
class EvolvingBase(BudgetBase, TimedBase):
    """Before its first step the model is dense; 0: it starts from a random mask. `update_every`: steps between changes, a
    share of the run, or tokens. `replace`: the share of a mask that an update at step 0 would replace; later ones replace
    less, along a cosine to the last."""

    update_every: FixedAsSteps[int | float] = 100
    replace: MayChange[float] = 0.3


@dataclass(frozen=True, kw_only=True)
class SET(EvolvingBase):
    """`redistribute`: matrices compete for what is dropped, at a fixed total (`optim.sparse.evolve`). `growth`: `unfired`
    prefers weights that no mask has had yet."""

    name: Fixed[Literal["set"]] = "set"
    redistribute: MayChange[bool] = False
    growth: Fixed[Literal["random", "unfired"]] = "random"


@dataclass(frozen=True, kw_only=True)
class RigL(EvolvingBase):
    """`redistribute`: matrices compete for what is dropped, at a fixed total (`optim.sparse.evolve`)."""

    name: Fixed[Literal["rigl"]] = "rigl"
    redistribute: MayChange[bool] = False


@dataclass(frozen=True, kw_only=True)
class SRigL(EvolvingBase):
    """`ablate_below`: a neuron with fewer salient weights than this share of the fan-in is left out; 0: none ever is. As
    its authors have it for transformers; for convolutions they have 0.3 and erk."""

    name: Fixed[Literal["srigl"]] = "srigl"
    distribution: Fixed[Literal["uniform", "er", "erk"]] = "uniform"
    ablate_below: MayChange[float] = 0.95


@dataclass(frozen=True, kw_only=True)
class GradualBase(TimedBase):
    """Dense until its first step; then the density falls with a cube. `density`: what is kept at the last step.
    `distribution`: `global` lets all matrices compete; else as for masks that evolve. `update_every`: steps between
    changes, a share of the run, or tokens."""

    density: Fixed[float] = 0.2
    distribution: Fixed[Literal["global", "uniform", "er", "erk"]] = "global"
    update_every: FixedAsSteps[int | float] = 1


@dataclass(frozen=True, kw_only=True)
class Gradual(GradualBase):
    """Zhu & Gupta, *To Prune, or Not to Prune*, who prune a model that has learned something."""

    START = 0.1
    name: Fixed[Literal["gradual"]] = "gradual"
    distribution: Fixed[Literal["global", "uniform", "er", "erk"]] = "uniform"
    update_every: FixedAsSteps[int | float] = 10


@dataclass(frozen=True, kw_only=True)
class ST3(GradualBase):
    """From 5 % to 50 % of the run, as its authors' code. `rescale`: rows grow by what their masks leave out.
    `account_every`: steps between counts of what masks do; they change at every update."""

    START, STOP = 0.05, 0.5
    name: Fixed[Literal["st3"]] = "st3"
    rescale: MayChange[bool] = True
    account_every: MayChange[int] = 100


@dataclass(frozen=True, kw_only=True)
class PDPBase(TimedBase):
    """Dense until its first step, then soft masks, hard from its last on: 16 and 83 of the 100 epochs that the paper
    trains. `temperature`: of the soft mask, in units of squared weights (of rows: of squared norms). `account_every`: steps
    between counts of what masks do."""

    START, STOP = 0.16, 0.83
    temperature: MayChange[float] = 1e-4
    account_every: MayChange[int] = 100


@dataclass(frozen=True, kw_only=True)
class PDP(PDPBase):
    """Single weights. `density`: what is kept at the end. `distribution`: `global` lets all matrices compete at the first
    step, once; from there each goes along a line to its own share. `update_every`: steps between changes, a share of the
    run, or tokens."""

    name: Fixed[Literal["pdp"]] = "pdp"
    density: Fixed[float] = 0.2
    distribution: Fixed[Literal["global", "uniform", "er", "erk"]] = "global"
    update_every: FixedAsSteps[int | float] = 1


@dataclass(frozen=True, kw_only=True)
class PDPRows(PDPBase):
    """Whole rows, which are output channels, by their norms. `density`: of each matrix's rows, what is kept at the end,
    along a line. `update_every`: steps between changes, a share of the run, or tokens."""

    name: Fixed[Literal["pdp_rows"]] = "pdp_rows"
    density: Fixed[float] = 0.5
    update_every: FixedAsSteps[int | float] = 1
    temperature: MayChange[float] = 1e-2


@dataclass(frozen=True, kw_only=True)
class PDPGroups(PDPBase):
    """`n`: of `m` neighbours along the row, how many are kept. `m`: how many neighbours are one group."""

    name: Fixed[Literal["pdp_nm"]] = "pdp_nm"
    n: Fixed[int] = 2
    m: Fixed[int] = 4


@dataclass(frozen=True, kw_only=True)
class NM(SparseBase):
    """`n`: of `m` neighbours along the row, how many are kept. `m`: how many neighbours are one group. `backward`: `column`
    prunes along the column for the input gradient (BDWP), `row` is SR-STE. `decay`: SR-STE's, times the weight added to the
    gradient of what is pruned, before the rule (`optim.sparse.sr_ste`). `semi_structured`: multiply by the hardware's 2:4
    form, where it is measured to be faster. `account_every`: steps between counts of what masks do."""

    name: Fixed[Literal["nm"]] = "nm"
    n: Fixed[int] = 2
    m: Fixed[int] = 4
    backward: MayChange[Literal["column", "row"]] = "column"
    decay: MayChange[float] = 2e-4
    semi_structured: MayChange[bool] = False
    account_every: MayChange[int] = 100


SparsityConfig = NoSparsity | Static | SET | RigL | SRigL | Gradual | ST3 | PDP | PDPRows | PDPGroups | NM
Budgeted = Static | SET | RigL | SRigL | Gradual | ST3 | PDP


def sparse_layers(config: SparsityConfig, specs: Specs) -> list[str]:
    """Returns the names of the sparse matrices, in the order of the model."""
    if isinstance(config, NoSparsity):
        return []
    hidden = [name for name, spec in specs.items() if spec.role == "hidden"]
    return [name for name in hidden if any(fnmatchcase(name, pattern) for pattern in config.layers)]


def starts_at_random(config: SparsityConfig, steps: int) -> bool:
    """Says whether the first mask is drawn before anything is learned."""
    return isinstance(config, Static) or (isinstance(config, EvolvingBase) and config.first_step(steps) == 0)
