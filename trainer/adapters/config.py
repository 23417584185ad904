"""The choices of `adapter`: what learns beside matrices that are frozen, and which of a model's matrices have it."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch

from rowwise.conf.option import Fixed, FixedAsSteps, MayChange
from rowwise.kernels.spec import Constant, Normal, ParameterSpec, Uniform

Init = Literal["kaiming", "pissa", "eva", "corda"]
Mode = Literal["instruction", "knowledge"]
FROM_DATA = ("eva", "corda")  # what `adapter.init` finds in what layers take
OUT_OF_W = ("pissa", "corda")  # what it takes out of W
Added = dict[str, ParameterSpec]  # by name, inside the layer of the matrix
MAGNITUDE = "magnitude"
ADDED = ("lora_a", "lora_b", "lora_e", MAGNITUDE, "bone")  # every name that an adapter has beside a matrix


@dataclass(frozen=True, kw_only=True)
class NoAdapter:
    """Every parameter learns."""

    name: Fixed[Literal["none"]] = "none"


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """Of a model with an adapter only that learns. `layers`: shell patterns of parameter names; the hidden matrices that match one
    have it. `train`: shell patterns of parameters that learn beside it, whole."""

    layers: Fixed[list[str]] = field(default_factory=lambda: ["*"])
    train: Fixed[list[str]] = field(default_factory=list)

    def added(self, matrix: torch.Size) -> Added:
        """Gives the specs of what stands beside a matrix (rows, columns)."""
        raise NotImplementedError

    def at(self, name: str) -> Self:
        """Returns the adapter of the matrix of that name alone, which may be of a rank of its own."""
        return self

    def leaves_out(self, name: str) -> bool:
        """Says whether a matrix that `layers` matches has no adapter all the same."""
        return False


@dataclass(frozen=True, kw_only=True)
class LowRankBase(AdapterBase):
    """Beside W (m, n) stand A (r, n) and B (m, r). `rank`: r of what is added to a matrix. `alpha`: what is added is multiplied by
    alpha / rank. `dropout`: the share of what goes into A that is 0, the rest made larger by as much, drawn for its sample, place,
    layer and feature."""

    rank: Fixed[int] = 8
    alpha: Fixed[float] = 16.0
    dropout: MayChange[float] = 0.0

    @property
    def scale(self) -> float:
        """What the product of its matrices is multiplied by."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LoraBase(LowRankBase):
    """`rslora`: what is added is multiplied by alpha / sqrt(rank) (Kalajdzievski, *rsLoRA*). `b_lr_ratio`: the learning rate of B, as
    a multiple of A's (Hayou et al., *LoRA+*)."""

    rslora: Fixed[bool] = False
    b_lr_ratio: MayChange[float] = 1.0

    @property
    def scale(self) -> float:
        """What the product of its matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def added(self, matrix: torch.Size) -> Added:
        """A begins uniform in +-1 / sqrt(n), which is Kaiming's with a = sqrt(5), as torch's linear layers do; B is 0."""
        rows, columns = matrix
        return {
            "lora_a": ParameterSpec(torch.Size((self.rank, columns)), "adapter", Uniform(1 / math.sqrt(columns))),
            "lora_b": ParameterSpec(torch.Size((rows, self.rank)), "adapter", Constant(0.0), rate=self.b_lr_ratio),
        }


@dataclass(frozen=True, kw_only=True)
class LoadedBase(LoraBase):
    """What a folder of PEFT's may hold. `init_from`: a folder of PEFT's that it starts from; null: none."""

    init_from: MayChange[str | None] = None  # to null alone: `trainer.resume` refuses another source


@dataclass(frozen=True, kw_only=True)
class Lora(LoadedBase):
    """Hu et al., *LoRA*. `init`: what A and B begin as: A at random and B as 0 (`kaiming`), both as the principal part of W, which
    goes out of W (`pissa`: Meng et al., *PiSSA*), A as the directions in which what the layer takes varies most (`eva`: Paischer et
    al., *EVA*), or both as the part of W that matters for what it takes, or does not, which goes out of W (`corda`: Yang et al.,
    *CorDA*). `init_batches`: the first global batches of the run, in which eva and corda see what layers take. `corda_mode`: the
    part that matters most learns (`instruction`), or that which matters least, so that what the model knows stays (`knowledge`).
    `eva_rho`: a matrix has at most so many times `rank`: eva gives more to those whose layers take what varies most in few
    directions, less or none to others, and as much to all together (1: as much to each). `ranks`: what it gave to each; null: it is
    asked before the first step."""

    name: Fixed[Literal["lora"]] = "lora"
    init: Fixed[Init] = "kaiming"
    init_batches: Fixed[int] = 8
    corda_mode: Fixed[Mode] = "instruction"
    eva_rho: Fixed[float] = 2.0
    ranks: Fixed[dict[str, int] | None] = None

    def at(self, name: str) -> Self:
        """Returns the adapter of the matrix of that name alone. Its scale is that of all: `alpha` grows as the rank does."""
        rank = self.rank if self.ranks is None else self.ranks[name]
        if rank == self.rank:
            return self
        share = rank / self.rank
        return replace(self, rank=rank, alpha=self.alpha * (math.sqrt(share) if self.rslora else share), ranks=None)

    def leaves_out(self, name: str) -> bool:
        """Says whether it gave nothing to the matrix of that name."""
        return self.ranks is not None and self.ranks.get(name) == 0


@dataclass(frozen=True, kw_only=True)
class LqLora(LoraBase):
    """Guo et al., *LQ-LoRA*: W is kept as codes, and A and B begin as what these leave of it. `bits`: of the matrices that have the
    adapter, a number of theirs, scales among them; an integer programme gives some more and others fewer. `forms`: what it gave to
    each, bits of a number/numbers of a block/bits of a scale; null: it is asked before the first step. `fisher`: errors of a number
    count by its squared gradients in the first `init_batches` global batches of the run; false: all alike."""

    name: Fixed[Literal["lq_lora"]] = "lq_lora"
    bits: Fixed[float] = 4.0
    fisher: Fixed[bool] = False
    init_batches: Fixed[int] = 8
    forms: Fixed[dict[str, str] | None] = None


@dataclass(frozen=True, kw_only=True)
class Dora(LoadedBase):
    """Liu et al., *DoRA*: of every row of W + s B A the size learns by itself."""

    name: Fixed[Literal["dora"]] = "dora"

    def added(self, matrix: torch.Size) -> Added:
        """Sizes begin as those of the rows of W, which `trainer.adapters.initial` finds."""
        return super().added(matrix) | {MAGNITUDE: ParameterSpec(matrix[:1], "vector")}


@dataclass(frozen=True, kw_only=True)
class AdaLora(LowRankBase):
    """Zhang et al., *AdaLoRA*: beside W stands B diag(E) A, of whose triplets (a column of B, a number of E, a row of A) those stay
    that matter most, over all matrices. `rank`: triplets of each matrix at first. `target_rank`: those of a matrix in the end, on the
    mean. `start`: the step, or share of the run, after which triplets go; `stop`: the one from which those that are left stay.
    `every`: steps between two choices. `betas`: of the averages of importance and of how it varies. `orthogonality`: the weight of
    how far A and B are from orthogonal, in gradients alone."""

    name: Fixed[Literal["adalora"]] = "adalora"
    rank: Fixed[int] = 12
    alpha: Fixed[float] = 32.0
    target_rank: Fixed[int] = 8
    start: FixedAsSteps[int | float] = 0.1
    stop: FixedAsSteps[int | float] = 0.7
    every: MayChange[int] = 10
    betas: MayChange[list[float]] = field(default_factory=lambda: [0.85, 0.85])
    orthogonality: MayChange[float] = 0.1

    @property
    def scale(self) -> float:
        """As its authors have it."""
        return self.alpha / (self.rank + 1e-5)

    def times(self, steps: int) -> tuple[int, int]:
        """Returns `start` and `stop` of a run of so many steps, as steps."""
        first, last = (t if isinstance(t, int) else round(t * steps) for t in (self.start, self.stop))
        return first, last

    def added(self, matrix: torch.Size) -> Added:
        """A and B are normal, E is 0."""
        rows, columns = matrix
        return {
            "lora_a": ParameterSpec(torch.Size((self.rank, columns)), "adapter", Normal(0.02)),
            "lora_e": ParameterSpec(torch.Size((self.rank, 1)), "adapter", Constant(0.0)),
            "lora_b": ParameterSpec(torch.Size((rows, self.rank)), "adapter", Normal(0.02)),
        }


@dataclass(frozen=True, kw_only=True)
class Bone(AdapterBase):
    """Kang & Yin, *Bone*: beside W (m, n) stands P (r, m), whose transpose is added to every r columns of it. `rank`: r; of more
    parameters the larger it is, and no larger than n."""

    name: Fixed[Literal["bone"]] = "bone"
    rank: Fixed[int] = 16

    def added(self, matrix: torch.Size) -> Added:
        """P is 0."""
        return {"bone": ParameterSpec(torch.Size((self.rank, matrix[0])), "adapter", Constant(0.0))}


AdapterConfig = NoAdapter | Lora | Dora | LqLora | AdaLora | Bone
