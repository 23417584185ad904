"""The configurations of the low-rank rules. Hidden matrices follow them, everything else AdamW."""

from dataclasses import dataclass
from typing import Literal

from rowwise.conf.option import Fixed, MayChange
from rowwise.optim.common import AdamBase


@dataclass(frozen=True, kw_only=True)
class ProjectedBase(AdamBase):
    """`refresh_every`: steps between renewals of the projection. `scale`: stands before the update. `side`: which side of a
    wide matrix is projected, `right` (its columns, so that nothing crosses ranks) or `short` (its rows, as the papers do,
    by an all-to-all there and back)."""

    lr: MayChange[float] = 1e-2
    weight_decay: MayChange[float] = 0.0
    refresh_every: MayChange[int] = 200
    scale: MayChange[float] = 1.0
    side: MayChange[Literal["right", "short"]] = "right"

    def check(self) -> None:
        super().check()
        if self.refresh_every < 1 or self.scale <= 0:
            raise ValueError("optim.refresh_every is at least 1, optim.scale is above 0")


@dataclass(frozen=True, kw_only=True)
class LowRankBase(ProjectedBase):
    """`rank`: r of the projected gradient (m, r); null: a quarter of the model's width, or the narrow side of a matrix
    where that is less. `state_bits`: 32, or 8 for block-wise quantised moments."""

    rank: Fixed[int | None] = None
    state_bits: Fixed[Literal[8, 32]] = 32

    def check(self) -> None:
        super().check()
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"optim.rank={self.rank}: it is at least 1; null is a quarter of the model's width")


@dataclass(frozen=True, kw_only=True)
class LimitedBase(ProjectedBase):
    """`growth`: by how much the norm of a matrix's update (in Fira, of what is outside the subspace) may grow in a step;
    null: without limit."""

    growth: MayChange[float | None] = 1.01

    def check(self) -> None:
        super().check()
        if self.growth is not None and self.growth < 1:
            raise ValueError(
                f"optim.growth={self.growth}: the norm may grow by this factor, which is at least 1; null is no limit"
            )


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(LowRankBase):
    name: Fixed[Literal["galore"]] = "galore"
    scale: MayChange[float] = 0.25


@dataclass(frozen=True, kw_only=True)
class DCTConfig(LowRankBase):
    """Columns of the DCT-II, ranked by sums of squares. The authors' DCTAdamW has the DCT-II with sim_type=makhoul and its
    transpose, the DCT-III, by default; it ranks by sums of absolute values."""

    name: Fixed[Literal["dct"]] = "dct"


@dataclass(frozen=True, kw_only=True)
class FiraConfig(LimitedBase, LowRankBase):
    """`form`: the rule of its authors' `code`, or Algorithm 1 of their `paper`, which is another."""

    name: Fixed[Literal["fira"]] = "fira"
    scale: MayChange[float] = 0.25
    form: MayChange[Literal["code", "paper"]] = "code"


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(LimitedBase, LowRankBase):
    """`scale`: the square of what stands before the update, as in its authors' code."""

    name: Fixed[Literal["apollo"]] = "apollo"


@dataclass(frozen=True, kw_only=True)
class ApolloMiniConfig(LimitedBase):
    """Rank 1, whose moments are too short for 8-bit blocks, and one factor a matrix. `scale`: the square of what stands
    before the update, as in its authors' code."""

    name: Fixed[Literal["apollo_mini"]] = "apollo_mini"
    scale: MayChange[float] = 128.0
