"""The configurations of the low-rank rules. Hidden matrices follow them, everything else AdamW."""

from dataclasses import dataclass
from typing import Literal

from rowwise.optim.common import AdamBase


@dataclass(frozen=True, kw_only=True)
class LowRankBase(AdamBase):
    """`rank` r of the projected gradient (m, r); the projection is renewed every `refresh_every` steps; `scale` stands
    before the projected update; `state_bits`: 32, or 8 for block-wise quantised moments."""

    rank: int = 128
    refresh_every: int = 200
    scale: float = 1.0
    state_bits: Literal[8, 32] = 32


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
    """`growth`: how much the norm of what is outside the subspace may grow in a step."""

    name: Literal["fira"] = "fira"
    scale: float = 0.25
    growth: float = 1.01


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(LowRankBase):
    name: Literal["apollo"] = "apollo"


@dataclass(frozen=True, kw_only=True)
class ApolloMiniConfig(AdamBase):
    """Rank 1 and one scale a matrix. `scale` is the paper's sqrt(128)."""

    name: Literal["apollo_mini"] = "apollo_mini"
    refresh_every: int = 200
    scale: float = 11.313708498984761
    state_bits: Literal[8, 32] = 32
