"""The configurations of the low-rank rules. Hidden matrices follow them, everything else AdamW."""

from dataclasses import dataclass
from typing import Literal

from rowwise.optim.common import AdamBase


@dataclass(frozen=True, kw_only=True)
class ProjectedBase(AdamBase):
    """`refresh_every`: steps between renewals of the projection; `scale` stands before the update."""

    refresh_every: int = 200
    scale: float = 1.0

    def check(self) -> None:
        super().check()
        if self.refresh_every < 1 or self.scale <= 0:
            raise ValueError("optim.refresh_every is at least 1, optim.scale is above 0")


@dataclass(frozen=True, kw_only=True)
class LowRankBase(ProjectedBase):
    """`rank`: r of the projected gradient (m, r); `state_bits`: 32, or 8 for block-wise quantised moments."""

    rank: int = 64
    state_bits: Literal[8, 32] = 32

    def check(self) -> None:
        super().check()
        if self.rank < 1:
            raise ValueError(f"optim.rank={self.rank}: it is at least 1")


@dataclass(frozen=True, kw_only=True)
class GaLoreConfig(LowRankBase):
    name: Literal["galore"] = "galore"
    scale: float = 0.25


@dataclass(frozen=True, kw_only=True)
class DCTConfig(LowRankBase):
    name: Literal["dct"] = "dct"
    scale: float = 0.25


@dataclass(frozen=True, kw_only=True)
class FiraConfig(LowRankBase):
    """`growth`: by how much the norm of what is outside the subspace may grow in a step."""

    name: Literal["fira"] = "fira"
    scale: float = 0.25
    growth: float = 1.01

    def check(self) -> None:
        super().check()
        if self.growth < 1:
            raise ValueError(f"optim.growth={self.growth}: the norm may grow by this factor, which is at least 1")


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(LowRankBase):
    name: Literal["apollo"] = "apollo"


@dataclass(frozen=True, kw_only=True)
class ApolloMiniConfig(ProjectedBase):
    """Rank 1, whose moments are too short for 8-bit blocks, and one factor a matrix. `scale` is the paper's sqrt(128)."""

    name: Literal["apollo_mini"] = "apollo_mini"
    scale: float = 11.313708498984761
